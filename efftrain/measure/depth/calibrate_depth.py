"""``efftrain calibrate-depth``: measures with which depth a trained model can be decoded.

It chooses the drafts of self-speculation and the confidence thresholds of early exits, and counts the layers by class
of token. The result is ``depth.json`` (and ``depth_probe.npz``) in the run, which is only valid for the measured model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import efftrain
from efftrain import data
from efftrain.code_identity import code_identity
from efftrain.config import LATER, to_json
from efftrain.errors import ConfigError, CorpusError, RunError
from efftrain.measure.depth.depth_calibration import FILE_NAME, PROBE_NAME, write_probe
from efftrain.measure.depth.depth_report import add_to_scorecard, flops_at, report_depth, rows_to_report, whole_rows
from efftrain.measure.depth.exit_curves import (
    QUANTILES,
    RULES,
    Rows,
    TokenTable,
    full_choices,
    measure_exit,
    measure_seconds,
    routed_depths,
    tune,
)
from efftrain.measure.depth.risk import documents_needed, last_safe
from efftrain.measure.depth.speculation import measure_speculation
from efftrain.measure.measurements import Measurements, write_json
from efftrain.measure.quality.held_out import CHOICES, choosing, reporting
from efftrain.measure.quality.row_documents import after_tuning, count_documents, with_documents
from efftrain.measure.quality.token_classes import token_classes
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe
from efftrain.models.depth.routed_depth import has_routed_depth
from efftrain.progress import Progress
from efftrain.train.inputs import content, model_digest
from efftrain.train.run.directory import read_json, row_length
from efftrain.train.run.environment import environment
from efftrain.train.run.tokenizers import check_tokenizer

ROOMS = ("data", "measure", "models", "ops")  # packages whose code decides what is measured
NEVER = 2.0  # a threshold that no confidence reaches
QUALITY_LOSS = 0.01  # relative increase of the bits per byte that the point ``within_quality_loss`` may cost


@dataclass(frozen=True, kw_only=True)
class DepthCalibration:
    """Options of the calibration: what is measured, and on how much text.

    Attributes:
      exits: numbers of layers that draft. Empty: from 1 to half of the model's layers.
      drafts: lengths of a draft in tokens.
      prompts: number of prompts, from rows of the validation split; each is continued alone.
      prompt_length, n_new: tokens of a prompt, and new tokens; the prompts are shortened if both together are longer
        than ``max_length``.
      rows: number of rows of the validation split, in its order, for the confidence curves. A third of them trains the
        probe and gives the thresholds that are tried; the rest chooses one of these. The result is measured on other
        rows, see ``held_out``.
      risk: the share of a document's tokens that may differ from those of all layers, on average over documents.
      error: the probability with which the true risk may be larger than ``risk``.
      length: tokens of a row. None: as the run was trained.
    """

    exits: tuple[int, ...] = ()
    drafts: tuple[int, ...] = (1, 2, 3, 4, 6)
    prompts: int = 24
    prompt_length: int = 128
    n_new: int = 64
    rows: int = 384
    risk: float = 0.1
    error: float = 0.05
    length: int | None = field(default=None, metadata=LATER)

    def __post_init__(self):
        for name in ("prompts", "prompt_length", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"calibration.{name} is {getattr(self, name)}; it must be at least 1")
        if self.n_new < 2:
            raise ConfigError(f"calibration.n_new is {self.n_new}; give at least 2, as the first is the prompt's")
        for name in ("risk", "error"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"calibration.{name} is {getattr(self, name)}; give a share between 0 and 1")
        if not self.drafts:
            raise ConfigError("calibration.drafts is empty; give at least one length, such as 3")

    @property
    def tuning_rows(self) -> int:
        return max(self.rows // 3, 1)


def calibrate(run: Path, options: DepthCalibration, *, corpus: Path | None = None) -> dict[str, Any]:
    """Calibrates the depth of a run's model, writes ``depth.json`` into the run, and adds the figures to its scorecard.

    If it was interrupted, a second call only measures what is missing.

    Args:
      run: directory of a training run.
      options: options of the calibration.
      corpus: the corpus; its validation split is used to choose, and its test split to report. None: that of the run.

    Returns:
      The content of ``depth.json``.

    Raises:
      EfftrainError: the run, its corpus and the options do not fit each other.
    """
    model, settings = efftrain.load(run), read_json(run / "config.json")
    if corpus is None and not settings.get("corpus"):
        raise ConfigError(f"the configuration of {run} names no corpus; give the one it was trained on with --corpus")
    corpus_path = corpus or Path(settings["corpus"])
    opened = data.open(corpus_path)
    opened.check_model(model.config.vocab_size)
    check_tokenizer(Path(run), corpus_path)
    length = row_length(Path(run), settings, options.length)
    rows = _rows(corpus_path, length, options, opened.end_of_text_id)
    size = len(rows[0]["tokens"])
    chosen = 0 if has_routed_depth(model) else options.rows  # routed depth chooses nothing here
    held_out = reporting(corpus_path, length, chosen=chosen, batch_size=size)
    report_on = with_documents(
        rows_to_report(held_out, options.rows - options.tuning_rows, size), opened.end_of_text_id
    )
    made_from = {"model": model_digest(model), "options": to_json(options), "corpus": content(corpus_path)}
    with Measurements(run / FILE_NAME, made_from, code_identity(model.config, rooms=ROOMS)) as kept:
        texts = opened.tokenizer().decode_batch([[i] for i in range(opened.vocab_size)], skip_special_tokens=True)
        classes = token_classes(texts)
        text, report_text = (TokenTable(classes, opened.token_bytes(split)) for split in (CHOICES, held_out.split))
        found = {"chosen_on": {"split": CHOICES, "rows": options.rows}}
        report = {"split": held_out.split, "rows": size * len(report_on), "note": held_out.note}
        if model.config.n_layers < 2 and not has_routed_depth(model):
            raise ConfigError(f"the model of {run} has one layer, which cannot be skipped")
        if has_routed_depth(model):
            found = {"routed_depth": kept.cell("routed", lambda: routed_depths(model, report_on, report_text))}
        else:
            tuning, free = _split(rows, options)
            prompts, others = (_prompts(of, options, model.config.max_length) for of in (rows, report_on))
            found["self_speculation"] = _speculation(model, prompts, options, kept)
            found["confidence_exit"], probe = _exits(model, tuning, free, text, options, kept)
            report |= report_depth(model, report_on, others, report_text, found, probe, options.n_new, kept)
            found["seconds"] = _seconds(model, others, found["confidence_exit"], probe, options, kept)
            write_probe(run / PROBE_NAME, probe)
            found["chosen_rule"] = _best_rule(model, found["confidence_exit"])
        result = kept.values | found | {"report": report, "environment": environment()}
        write_json(run / FILE_NAME, result)
        kept.remove()
    add_to_scorecard(run, model, result, length)
    return result


def _rows(corpus: Path, length: int, options: DepthCalibration, end_of_text_id: int) -> list[dict[str, np.ndarray]]:
    """Validation rows in batches, first those for tuning, with their ``documents``; see ``with_documents``.

    The rows are consecutive, so that few documents are cut; documents are shuffled in a corpus.

    Raises:
      CorpusError: the split has fewer rows.
    """
    size = next(n for n in (8, 4, 2, 1) if options.tuning_rows % n == options.rows % n == 0)
    whole = whole_rows(choosing(corpus, length), options.rows, size)
    if len(whole) < options.rows // size:
        raise CorpusError(
            f"{corpus}: the validation split has {len(whole) * size} rows of {length} tokens and calibration.rows is "
            f"{options.rows}; give fewer --rows"
        )
    return with_documents(whole, end_of_text_id)


def _prompts(rows: Rows, options: DepthCalibration, max_length: int) -> list[np.ndarray]:
    if options.n_new >= max_length:
        raise ConfigError(f"calibration.n_new is {options.n_new} and model.max_length {max_length}; generate fewer")
    length = min(options.prompt_length, rows[0]["tokens"].shape[1], max_length - options.n_new)
    tokens = np.concatenate([row["tokens"] for row in rows])[:, :length].astype(np.int32)
    spread = np.linspace(0, len(tokens) - 1, min(options.prompts, len(tokens))).astype(int)  # spread over the documents
    return [row[None] for row in tokens[spread]]


def _split(rows: Rows, options: DepthCalibration) -> tuple[Rows, Rows]:
    """Splits the rows into those for tuning and the rest; raises ConfigError if the rest has too few documents."""
    n_tuning = options.tuning_rows // len(rows[0]["tokens"])
    held_out = after_tuning(rows, n_tuning)
    there, needed = count_documents(held_out), documents_needed(options.risk, options.error)
    if there < needed:
        raise ConfigError(
            f"calibration.rows is {options.rows}, too few to show a risk of {options.risk} at an error of "
            f"{options.error}: {there} documents begin in the rows that tuning leaves and {needed} are needed; give "
            "more --rows, or a larger risk"
        )
    return rows[:n_tuning], held_out


def _speculation(
    model: Decoder, prompts: list[np.ndarray], options: DepthCalibration, kept: Measurements
) -> dict[str, Any]:
    """Measures every exit layer and draft length; returns the fastest that keeps the tokens, with the whole grid."""
    exits = options.exits or tuple(range(1, model.config.n_layers // 2 + 1))
    pairs = [SelfSpeculation(exit_layer=e, n_draft=k) for e in exits for k in options.drafts]
    for pair in pairs:
        pair.check(model.config)
    grid = []
    with Progress("drafts", len(pairs), unit="settings") as progress:
        for pair in pairs:
            name = f"draft {pair.n_draft} with {pair.exit_layer}"
            progress.note(name)
            grid.append(kept.cell(name, partial(measure_speculation, model, prompts, pair, options.n_new)))
            progress.advance()
    good = [cell for cell in grid if cell["identical"] and cell["speedup"] > 1]
    best = max(good, key=lambda cell: cell["speedup"], default={"exit_layer": None, "n_draft": None})
    return best | {"grid": grid}


def _exits(
    model: Decoder, tuning: Rows, held_out: Rows, text: TokenTable, options: DepthCalibration, kept: Measurements
) -> tuple[dict[str, Any], ExitProbe]:
    """For each rule, a curve over thresholds and the chosen points of ``_choose``; and the probe."""
    tuned = kept.cell("tuned", lambda: tune(model, tuning))
    probe = ExitProbe(**{name: jnp.asarray(values, jnp.float32) for name, values in tuned["probe"].items()})
    full, found = full_choices(model, held_out), {}
    with Progress("exits", len(RULES) * (len(QUANTILES) + 1), unit="thresholds") as progress:
        for rule in RULES:
            points = []
            for threshold in (NEVER, *tuned["thresholds"][rule]):
                progress.note(f"{rule} {threshold:.4f}")
                measure = partial(
                    measure_exit, model, held_out, full, text, ConfidenceExit(rule=rule), threshold, probe
                )
                points.append(kept.cell(f"{rule} {threshold}", measure))
                progress.advance()
            found[rule] = _choose(points, options) | {"tuned_on_tokens": tuned["tokens"]}
    return found, probe


def _seconds(
    model: Decoder,
    prompts: list[np.ndarray],
    exits: dict,
    probe: ExitProbe,
    options: DepthCalibration,
    kept: Measurements,
) -> dict[str, Any]:
    """Decoding times with one row and with eight, for each rule's threshold ``within_quality_loss``."""
    thresholds = {rule: found["within_quality_loss"]["threshold"] for rule, found in exits.items()}
    eight = np.tile(np.concatenate(prompts), (8, 1))[:8]
    return {
        f"batch {len(p)}": kept.cell(
            f"seconds {len(p)}", partial(measure_seconds, model, p, thresholds, probe, options.n_new)
        )
        for p in (prompts[0], eight)
    }


def _choose(points: list[dict], options: DepthCalibration) -> dict[str, Any]:
    safe = last_safe([point["document_losses"] for point in points], options.risk, options.error)
    full = points[0]["bpb"]
    if full is None:
        raise RunError("the model has no finite bits per byte with all its layers; calibrate another checkpoint")
    good = [p for p in points if p["bpb"] is not None and p["bpb"] <= full * (1 + QUALITY_LOSS)]
    curve = [_without_losses(point) for point in points]
    return {
        "threshold": points[safe]["threshold"] if safe else None,  # point 0 is decoding with all layers
        "risk": options.risk,
        "error": options.error,
        "within_quality_loss": _without_losses(min(good, key=lambda p: p["mean_depth"])),
        "curve": curve,
    }


def _without_losses(point: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in point.items() if k != "document_losses"}


def _best_rule(model: Decoder, exits: Mapping[str, Any]) -> str:
    """The rule whose point ``within_quality_loss`` needs the fewest FLOPs."""
    points = {rule: found["within_quality_loss"] for rule, found in exits.items()}
    return min(points, key=lambda rule: flops_at(model, rule, points[rule], context=1))
