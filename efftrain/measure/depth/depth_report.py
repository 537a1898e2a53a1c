"""Reports the quality and speed of the depths that a calibration chose, on rows on which nothing was chosen."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.errors import CorpusError
from efftrain.measure.cost.flops import decode_flops, head_flops
from efftrain.measure.depth.exit_curves import Rows, TokenTable, full_choices, measure_exit
from efftrain.measure.depth.speculation import measure_speculation
from efftrain.measure.measurements import Measurements
from efftrain.measure.quality.held_out import HeldOut
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard.scorecard import Figure, Scorecard
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe
from efftrain.progress import console


def whole_rows(held_out: HeldOut, n: int, size: int) -> list[Mapping[str, np.ndarray]]:
    """The first ``n`` rows, or as many as there are, in batches of ``size``; batches with padding rows are left out."""
    rows = itertools.islice(held_out.batches(size), n // size)
    return [row for row in rows if np.asarray(row["mask"]).any(1).all()]


def rows_to_report(held_out: HeldOut, n: int, size: int) -> list[Mapping[str, np.ndarray]]:
    """As ``whole_rows``, for the rows of ``held_out.reporting``.

    Raises:
      CorpusError: there is no whole batch.
    """
    rows = whole_rows(held_out, n, size)
    if not rows:
        raise CorpusError(
            f"{held_out.corpus}: the {held_out.split} split has no {size} rows of {held_out.length} tokens to "
            "report on beside those that were used to choose; give fewer --rows, or build the corpus with a larger "
            "test split"
        )
    return rows


def report_depth(
    model: Decoder,
    rows: Rows,
    prompts: Sequence[np.ndarray],
    text: TokenTable,
    chosen: Mapping[str, Any],
    probe: ExitProbe,
    n_new: int,
    kept: Measurements,
) -> dict[str, Any]:
    """Measures the quality with all layers and with each rule's chosen threshold, and the speed of the chosen drafts.

    Args:
      model, text, probe, n_new: as in the calibration.
      rows, prompts: the rows and prompts to report on.
      chosen: ``self_speculation`` and ``confidence_exit`` of the calibration.
      kept: the store of measurements.

    Returns:
      As JSON: ``confidence_exit`` and ``self_speculation``; the latter is None if no draft was chosen.
    """
    full, exits = full_choices(model, rows), {}
    for rule, found in chosen["confidence_exit"].items():
        exits[rule] = {}
        for name, point in (("all layers", found["curve"][0]), ("within_quality_loss", found["within_quality_loss"])):
            threshold = point["threshold"]
            measure = partial(measure_exit, model, rows, full, text, ConfidenceExit(rule=rule), threshold, probe)
            measured = kept.cell(f"report {rule} {threshold}", measure)
            exits[rule][name] = {k: v for k, v in measured.items() if k != "document_losses"}
    best, drafts = chosen["self_speculation"], None
    if best["exit_layer"] is not None:
        pair = SelfSpeculation(exit_layer=best["exit_layer"], n_draft=best["n_draft"])
        drafts = kept.cell("report drafts", partial(measure_speculation, model, prompts, pair, n_new))
    return {"confidence_exit": exits, "self_speculation": drafts}


def add_to_scorecard(run: Path, model: Decoder, values: Mapping[str, Any], length: int) -> None:
    """Adds the reported figures of a calibration to the scorecard of its run.

    Args:
      run: run directory.
      model: the model of the run.
      values: content of ``depth.json``.
      length: tokens of context for which FLOPs are counted.
    """
    if not (run / SCORECARD).exists():
        console.print(f"{run} has no scorecard to add the figures to; they are in {run}", markup=False)
        return
    card, figures = Scorecard.read(run / SCORECARD), {}
    report = values["report"]
    split, note = report["split"], report["note"]
    if "routed_depth" in values:
        depths = values["routed_depth"]
    else:
        rule = values["chosen_rule"]
        depths = report["confidence_exit"][rule]["within_quality_loss"]
        at = f"exit by {rule} at {depths['threshold']:.4f}, {depths['bpb']:.4f} bits/byte on the same rows"
        note = "; ".join(filter(None, (at, note)))
        s_per_token = values["seconds"]["batch 1"][rule]["s_per_token"]
        figures["decode_s_per_token_b1_exit"] = Figure(s_per_token, "s/token", "measured", note, split)
        figures["decode_flops_per_token_exit"] = Figure(
            flops_at(model, rule, depths, length),
            "FLOP/token",
            "counted",
            f"{note}; heads of the exits included",
            split,
        )
        if (best := report["self_speculation"]) is not None:
            drafts = f"{best['n_draft']} drafts with {best['exit_layer']} layers, {best['acceptance']:.0%} accepted"
            how = f"{drafts}; {best['speedup']:.2f}x plain decoding"
            figures["decode_s_per_token_b1_speculative"] = Figure(
                1 / best["tokens_per_s"], "s/token", "measured", how, split
            )
    figures["mean_depth"] = Figure(depths["mean_depth"], "layers/token", "measured", note, split)
    for name, depth in depths["mean_depth_by_class"].items():
        shares = f"to predict a {name}; tokens by layers: {histogram_text(depths['histogram_by_class'][name])}"
        figures[f"mean_depth_{name}"] = Figure(depth, "layers/token", "measured", shares, split)
    replace(card, figures=card.figures | figures).write(run / SCORECARD)


def histogram_text(shares: Sequence[float]) -> str:
    """A histogram of depths as text, such as ``2: 15%, 3: 60%``, without depths of fewer than one in 200 tokens."""
    return ", ".join(f"{depth}: {share:.0%}" for depth, share in enumerate(shares) if share >= 0.005)


def flops_at(model: Decoder, rule: str, point: Mapping[str, Any], context: int) -> float:
    """Expected FLOPs of decoding a token with early exits, without the keys and values of skipped layers.

    Args:
      model: the model.
      rule: the rule of the exits; "gap" applies the head after every layer.
      point: a point of a curve, with its ``mean_depth``.
      context: tokens of context.
    """
    heads = point["mean_depth"] - 1 if rule == "gap" else 0.0
    blocks = decode_flops(model, context) - head_flops(model)
    return blocks * point["mean_depth"] / model.config.n_layers + (1 + heads) * head_flops(model)
