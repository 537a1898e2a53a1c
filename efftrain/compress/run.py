"""``efftrain compress``: reads a run directory and writes a run directory with the compressed model."""

import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import efftrain
from efftrain import data
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.options import ALL_BLOCKS, Compression, parse
from efftrain.compress.origin import CUT, FILE_NAME, check_made_from, made_otherwise, origin, rounds_are_done
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.quantization.convert import convert
from efftrain.compress.quantization.mixed_precision import choose_formats
from efftrain.compress.recover import recover, recovery_training
from efftrain.compress.structured.cut import slim
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape
from efftrain.compress.structured.shape_latency import fast_shapes
from efftrain.compress.structured.shapes import Way, candidates
from efftrain.config import from_json, to_json
from efftrain.errors import ConfigError, RunError
from efftrain.experiment.experiment import reported
from efftrain.lock import Lock, beside
from efftrain.measure.measurements import Measurements, write_json
from efftrain.measure.quality.held_out import CHOICES, HeldOut
from efftrain.measure.scorecard.score import score
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard.scorecard import Figure, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.number_formats import parse_format
from efftrain.progress import console
from efftrain.sharding.hosts import Hosts
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.config import Training
from efftrain.train.run.directory import load_model_config, newest_step, read_json
from efftrain.train.run.environment import environment
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.run.writing import writing
from efftrain.train.state import split_model

SHAPES = "shapes.json"
TRIAL = 0.1  # share of the tokens of ``recover`` that each shape of a search is trained on

Changed = tuple[Decoder, dict[str, Any]]  # the new model, and the report as JSON


def compress(
    run: Path,
    options: Compression,
    *,
    out: Path | None = None,
    corpus: Path | None = None,
    evaluated_rows: int | None = None,
) -> Scorecard:
    """Compresses the model of a run into a new run directory and scores it; the original run is not changed.

    The new directory appears when the conversion is complete, or when its training begins; all stages before the last
    one are in ``OUT.stages``. If the command is interrupted, the same command continues: finished stages and trials are
    read and not repeated. Unfinished work of another version of the code is started again; finished work of another
    version raises an error.

    Args:
      run: directory of the run of a float model.
      options: what to do with the model.
      out: the new run directory. None: the directory of ``run`` with the options appended to its name.
      corpus: the corpus for calibration, training and evaluation. None: the corpus of the run.
      evaluated_rows: number of rows of the test split for the score; see ``measure.quality.held_out``. None: all.

    Returns:
      The scorecard of the new model.

    Raises:
      InUseError: another process is writing ``out``.
      EfftrainError: the run, the corpus and the options do not fit each other, or ``out`` holds something else.
    """
    if (Hosts.from_environment().processes or 1) > 1:
        raise ConfigError("a model is compressed by one process; unset EFFTRAIN_PROCESSES and start one")
    run = Path(run).resolve()
    config, settings = load_model_config(run), read_json(run / "config.json")
    if config.quantization.stored:
        raise ConfigError(f"the model of {run} is converted already; convert the one it was made from")
    if corpus is None and not settings.get("corpus"):
        raise ConfigError(f"the configuration of {run} names no corpus; give the one it was trained on with --corpus")
    text = CorpusRows(Path(corpus or settings["corpus"]).resolve(), settings["training"]["length"])
    check_tokenizer(run, text.corpus)
    if options.slim is not None or options.recover:  # fail before a stage is written
        _check_input(run, options)
    if options.chosen_on:  # a split that is too short fails here, before anything is computed
        text.choosing(options.rows).batches()
    text.reporting(evaluated_rows, chosen=options.chosen_on)
    out = run.with_name(f"{run.name}-{options.name}") if out is None else Path(out).resolve()
    with writing(out):
        lock = Lock(beside(out), out)
    with lock:
        return _compress(run, options, text, out, evaluated_rows)


def _compress(run: Path, options: Compression, text: CorpusRows, out: Path, evaluated_rows: int | None) -> Scorecard:
    if options.recover:
        return _in_rounds(run, options, text, out, evaluated_rows)
    model = _stage(run, options, text, out, evaluated_rows=evaluated_rows)
    if (out / SCORECARD).exists():
        return Scorecard.read(out / SCORECARD)
    card = _score(out, model or efftrain.load(out), text.reporting(evaluated_rows, chosen=options.chosen_on))
    card.write(out / SCORECARD)
    return card


def _check_input(run: Path, options: Compression) -> None:
    """Raises an error if the model has values that are not finite, or zeros whose pattern a cut would break."""
    share = zeros_share(efftrain.load(run))
    if share and options.slim is not None:
        raise ConfigError(
            f"{run} was pruned ({share:.0%} of the weights of its blocks are zero), and --slim would break the pattern "
            "of its zeros; cut the dense run first, and prune its smaller model with --sparsity"
        )


def _in_rounds(run: Path, options: Compression, text: CorpusRows, out: Path, evaluated_rows: int | None) -> Scorecard:
    """Prunes and trains, once per round."""
    stages, tokens = out.with_name(f"{out.name}.stages"), options.recover // options.rounds
    trained, sparse = run, options.sparsity is not None
    teacher = run if options.distill else None
    # Too few tokens or a split that is too short must fail before anything is computed.
    data.PackedRows(data.open(text.corpus, verify=False), "train", text.length)
    recovery_training(trained, tokens if options.search is None else round(TRIAL * tokens), sparse=sparse)
    training = recovery_training(trained, tokens, sparse=sparse, number=options.rounds)
    report = partial(reported, run=out, corpus=text.corpus, rows=evaluated_rows, chosen=options.chosen_on)
    if rounds_are_done(run, options, text, out, stages, evaluated_rows):
        console.print(f"{out} is converted already; nothing to do", markup=False)
        return report(Scorecard.read(out / SCORECARD), training=training)
    for number in range(1, options.rounds + 1):
        cut, once, shape = stages / f"{number}-cut", _round(options, number), None
        if options.search is not None:
            trial = recovery_training(trained, round(TRIAL * tokens), sparse=sparse, number=number)
            shape = _best_shape(run, options, once, text, stages / f"{number}-search", trial, teacher)
        _stage(run, once, text, cut, shape)
        last = number == options.rounds
        run = out if last else stages / f"{number}-recovered"
        rows = evaluated_rows if last else options.rows
        training = recovery_training(trained, tokens, sparse=sparse, number=number, last=last)
        card = recover(cut, training, run, text.corpus, sparse=sparse, rows=rows, teacher=teacher)
    return report(card, training=training)


def _round(options: Compression, number: int) -> Compression:
    """The options of one round: every round removes the same share of what the rounds before it left."""
    way = "width" if options.search is not None else options.way  # with a search, the shape decides what is cut
    once = replace(options, recover=0, rounds=1, search=None, way=way, distill=False)
    if options.rounds == 1:
        return once
    if options.slim is not None:
        return replace(once, slim=1 - (1 - options.slim) ** (1 / options.rounds))
    # The sparsity of a round includes the zeros of the rounds before it.
    return replace(once, sparsity=str(1 - (1 - options.structure.sparsity) ** (number / options.rounds)))


def _best_shape(
    run: Path,
    options: Compression,
    once: Compression,
    text: CorpusRows,
    folder: Path,
    training: Training,
    teacher: Path | None,
) -> Shape:
    """The shape whose model has the lowest bits per byte on the validation rows after a short training."""
    made_from = origin(run, options, text, rooms=CUT)
    before = read_json(folder / SHAPES) if (folder / SHAPES).exists() else {}
    reason = made_otherwise(before, made_from) if before else None
    if reason and any(path.name != SHAPES for path in folder.iterdir()):
        raise RunError(f"{folder} was made with {reason}; choose another --out")
    if before and not reason:  # read again, because shapes by latency would differ with each measurement
        shapes = [from_json(shape) for shape in before["shapes"]]
    else:
        shapes = _shapes(load_model_config(run), once, options.way, text)[: options.search]
        write_json(folder / SHAPES, made_from | {"shapes": [to_json(shape) for shape in shapes]})
    bpb = []
    for i, shape in enumerate(shapes):
        console.print(f"shape {i + 1} of {len(shapes)} that were found: {shape}", markup=False)
        cut = folder / f"{i + 1}-cut"
        _stage(run, once, text, cut, shape)
        card = recover(
            cut,
            training,
            folder / f"{i + 1}",
            text.corpus,
            sparse=False,
            rows=options.rows,
            teacher=teacher,
        )
        bpb.append(card.value("bpb"))
    if np.isnan(bpb).all():
        raise RunError(f"no shape of {folder} has finite bits per byte after its training; cut off less")
    figures = {"bpb": bpb, "split": CHOICES, "rows": options.rows}
    write_json(folder / SHAPES, made_from | {"shapes": [to_json(shape) for shape in shapes]} | figures)
    return shapes[int(np.nanargmin(bpb))]


def _shapes(config: ModelConfig, options: Compression, way: Way, text: CorpusRows) -> list[Shape]:
    if options.by == "latency":
        return fast_shapes(config, 1 - options.slim, way=way, length=text.length)
    return candidates(config, 1 - options.slim, way=way, by=options.by, length=text.length)


def _stage(
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
    shape = _shapes(config, options, options.way, text)[0] if shape is None else shape
    pieces = LayerwiseModel.read(run)
    model, report = slim(pieces, shape, importance(pieces, text.calibration(options.rows)))
    return model, {"slim": report.as_json()} | _quality(run, model, options, text)


def _prune(run: Path, config: ModelConfig, options: Compression, text: CorpusRows) -> Changed:
    method = options.method or "sparsegpt"
    quantization = None
    if options.quantize or options.activations:
        quantization = Quantization(rules=_rules(options, config), cache=config.quantization.cache)
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
        rules = _rules(options, config)
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


def _rules(options: Compression, config: ModelConfig) -> tuple[QuantizationRule, ...]:
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


def _score(out: Path, model: Decoder, held_out: HeldOut) -> Scorecard:
    card = score(
        model,
        name=out.name,
        length=held_out.length,
        quality=held_out.evaluator()(model),
        split=held_out.split,
        note=held_out.note,
        checkpoint=out / "checkpoints",
    )
    share = read_json(out / FILE_NAME).get("bytes_share")
    if share is not None and any(rule.weights for rule in model.config.quantization.rules):
        note = "quantised matrices with their scales, over float32"
        card = replace(card, figures=card.figures | {"quantized_bytes_share": Figure(share, "share", "counted", note)})
    return card
