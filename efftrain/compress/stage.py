"""One stage of a compression: a run directory in, the run directory of the converted model out."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import efftrain
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.options import ALL_BLOCKS, Compression, parse
from efftrain.compress.origin import CUT, FILE_NAME, check_made_from, origin
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.quantization.convert import convert
from efftrain.compress.quantization.mixed_precision import choose_formats
from efftrain.compress.structured.cut import slim
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape
from efftrain.compress.structured.shape_latency import fast_shapes
from efftrain.compress.structured.shapes import Way, candidates
from efftrain.config import to_json
from efftrain.errors import ConfigError, RunError
from efftrain.measure.measurements import Measurements, write_json
from efftrain.measure.quality.held_out import CHOICES
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.number_formats import parse_format
from efftrain.progress import console
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.run.directory import load_model_config, newest_step, read_json
from efftrain.train.run.environment import environment
from efftrain.train.state import split_model

Changed = tuple[Decoder, dict[str, Any]]  # the new model, and the report as JSON


def shapes_of_size(config: ModelConfig, options: Compression, way: Way, text: CorpusRows) -> list[Shape]:
    if options.by == "latency":
        return fast_shapes(config, 1 - options.slim, way=way, length=text.length)
    return candidates(config, 1 - options.slim, way=way, by=options.by, length=text.length)


def make_stage(
    run: Path,
    options: Compression,
    text: CorpusRows,
    out: Path,
    shape: Shape | None = None,
    evaluated_rows: int | None = None,
) -> Decoder | None:
    """Writes the run directory of a converted model and returns the model; None if the directory exists already."""
    settings, config = read_json(run / "config.json"), load_model_config(run)
    made_from = origin(run, options, text, rooms=CUT)
    made_from |= {"step": newest_step(run, settings), "shape": None if shape is None else to_json(shape)}
    made_from |= {"evaluated_rows": evaluated_rows}
    with Measurements(out, made_from, made_from["code"]) as kept:
        if out.exists():
            check_made_from(out, made_from)
            kept.remove()
            console.print(f"{out} is converted already", markup=False)
            return None
        if options.slim is not None:
            model, changes = _slim(run, config, options, text, shape)
        elif options.sparsity is not None:
            model, changes = _prune(run, config, options, text)
        else:
            model, changes = _quantize(run, config, options, text, kept)
        _write(out, run, model, settings, made_from | changes)
        kept.remove()
    return model


def _slim(run: Path, config: ModelConfig, options: Compression, text: CorpusRows, shape: Shape | None) -> Changed:
    shape = shapes_of_size(config, options, options.way, text)[0] if shape is None else shape
    pieces = LayerwiseModel.read(run)
    model, report = slim(pieces, shape, importance(pieces, text.calibration(options.rows)))
    return model, {"slim": report.as_json()} | _quality(run, model, options, text)


def _prune(run: Path, config: ModelConfig, options: Compression, text: CorpusRows) -> Changed:
    method = options.method or "sparsegpt"
    quantization = None
    if options.quantize or options.activations:
        quantization = Quantization(rules=rules_of(options, config), cache=config.quantization.cache)
    model, report = prune(
        LayerwiseModel.read(run),
        options.structure,
        method=method,
        calibration=None if method == "magnitude" else text.calibration(options.rows),
        quantization=quantization,
        layers=options.layers,
    )
    return model, report.as_json() | _quality(run, model, options, text)


def _quality(run: Path, model: Decoder, options: Compression, text: CorpusRows) -> dict[str, Any]:
    """Bits per byte on validation rows before and after pruning; the final figure is in the scorecard."""
    held_out = text.choosing(options.rows)
    bpb = {"bpb_before": efftrain.load(run), "bpb": model}
    evaluate = held_out.evaluator()
    return {"split": held_out.split, "rows": options.rows} | {name: evaluate(of)["bpb"] for name, of in bpb.items()}


def _quantize(run: Path, config: ModelConfig, options: Compression, text: CorpusRows, kept: Measurements) -> Changed:
    method = options.method or "nearest"
    calibration = text.calibration(options.rows) if method != "nearest" else None
    cache = parse(options.cache) or config.quantization.cache
    chosen = None
    if options.budget is not None:
        formats = [parse_format(part) for part in options.quantize.split(",")]
        evaluate = text.choosing(options.rows).evaluator()
        chosen = choose_formats(efftrain.load(run), formats, options.budget, lambda model: evaluate(model)["bpb"], kept)
        rules = chosen.rules
    else:
        rules = rules_of(options, config)
    quantization = Quantization(rules=rules, cache=cache)
    if quantization == Quantization():
        model = efftrain.load(run)
        if not zeros_share(model):
            raise ConfigError(
                f"{run} was not trained for a quantisation and has no zeros; say what to do, such as --quantize int8"
            )
        return model, {"bytes_share": None, "matrices": []}
    model, report = convert(
        LayerwiseModel.read(run), quantization, method=method, calibration=calibration, unrolled=chosen is not None
    )
    changes = report.as_json()
    if chosen is not None:
        changes["choice"] = chosen.as_json() | {"split": CHOICES, "rows": options.rows}
    return model, changes


def rules_of(options: Compression, config: ModelConfig) -> tuple[QuantizationRule, ...]:
    """The quantisation rules of the options; what the options leave open is as the run was trained."""
    weights, activations = parse(options.quantize), parse(options.activations)
    trained = config.quantization.rules
    if weights is None and activations is None:
        return trained
    if weights is None and trained:
        if options.layers != ALL_BLOCKS:
            raise ConfigError("the run has layers of its own that it was trained for; leave --layers out")
        return tuple(replace(rule, activations=activations) for rule in trained)
    rule = QuantizationRule(layers=options.layers, weights=weights, activations=activations)
    if any(r.learned_step for r in trained):
        if (same := replace(rule, learned_step=True)) in trained:
            return (same,)
        console.print(
            "warning: the run has learned its steps for other rules; scales are made anew (kept without --quantize)",
            style="yellow",
        )
    return (rule,)


def _write(out: Path, run: Path, model: Decoder, settings: dict[str, Any], made_from: dict[str, Any]) -> None:
    """Writes the new run directory, under another name until it is complete."""
    unfinished = out.with_name(f"{out.name}.incomplete")
    try:
        if unfinished.is_dir() and _is_ours(unfinished):
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        write_json(unfinished / FILE_NAME, made_from)
        training = settings.get("training", {}) | {"checkpoints": None}
        write_json(unfinished / "config.json", settings | {"model": to_json(model.config), "training": training})
        write_json(unfinished / "environment.json", environment())
        for name in ("recipe.py", "tokenizer.json"):
            if (run / name).exists():
                shutil.copyfile(run / name, unfinished / name)
        _, params, rest = split_model(model)
        with Checkpoints(unfinished / "checkpoints") as checkpoints:
            checkpoints.save(made_from["step"], {"params": params, "model_state": rest}, None, None, squeezed=True)
            checkpoints.wait()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free the disk or choose another --out") from error


def _is_ours(unfinished: Path) -> bool:
    """Whether a killed process of this command left the directory: its own file is the first that it writes."""
    return (unfinished / FILE_NAME).exists() or all(p.name.startswith(FILE_NAME) for p in unfinished.iterdir())
