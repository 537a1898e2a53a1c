"""``efftrain compress``: a run directory in, a run directory of the smaller model out."""

import itertools
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import efftrain
from efftrain import data
from efftrain.compress.mixed_precision import choose_formats
from efftrain.compress.observe import Calibration
from efftrain.compress.pieces import Pieces
from efftrain.compress.quantize import Method, Report, convert
from efftrain.config import to_json
from efftrain.errors import ConfigError, RunError
from efftrain.measure.evaluate import Evaluator
from efftrain.measure.kept import Kept, write_json
from efftrain.measure.score import score
from efftrain.measure.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard import Figure, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import AnyFormat, parse_format
from efftrain.progress import console
from efftrain.train.checkpoints import Checkpoints
from efftrain.train.run import checkpoint_directory, environment, load_model_config, read_json
from efftrain.train.state import split_model

FILE_NAME = "compression.json"
ALL_BLOCKS = "blocks/.*"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """What is done to a model.

    Attributes:
      quantize: the format of matrices, such as int8 or int4:g32; with a budget several, of falling size, with commas.
        None: what the run was trained for.
      activations: the format of what they are multiplied with. None: float.
      cache: the format of keys and values. None: float.
      layers: a regular expression for the names of matrices; see ``models.quantization.QuantizationRule``.
      method: see ``compress.quantize.convert``.
      budget: bytes of the blocks' matrices as a share of float32, for which each layer gets a format of its own.
      rows: of the training split, for "gptq" and "awq"; of the validation split, for each trial of a budget.
    """

    quantize: str | None = None
    activations: str | None = None
    cache: str | None = None
    layers: str = ALL_BLOCKS
    method: Method = "nearest"
    budget: float | None = None
    rows: int = 128

    def __post_init__(self):
        if self.rows < 1:
            raise ConfigError(f"--rows is {self.rows}; give at least 1")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ConfigError(f"--budget is {self.budget}; give a share between 0 and 1")
        if self.budget is not None and (self.quantize is None or "," not in self.quantize):
            raise ConfigError("--budget chooses between formats; give several, such as --quantize int8,int4:g32")
        if self.budget is None and "," in (self.quantize or ""):
            raise ConfigError(f"--quantize is {self.quantize}; give one format, or a --budget to choose by")
        if self.budget is not None and (self.activations or self.layers != ALL_BLOCKS):
            raise ConfigError("--budget is for the weights of all blocks; leave --activations and --layers out")
        if self.layers != ALL_BLOCKS and not (self.quantize or self.activations):
            raise ConfigError("--layers is given and not what to do with them; add --quantize or --activations")
        for text in (self.quantize or "").split(","):
            QuantizationRule(weights=_format(text), activations=_format(self.activations))
        Quantization(cache=_format(self.cache))

    @property
    def name(self) -> str:
        """Of the new run, behind that of the old one."""
        words = [self.quantize or "", self.activations and f"a-{self.activations}", self.cache and f"kv-{self.cache}"]
        words += [self.method if self.method != "nearest" else "", self.budget and f"{self.budget}x"]
        return "-".join(w for w in words if w).replace(":", "").replace(",", "-") or "stored"


def compress(run: Path, options: Compression, *, out: Path | None = None, corpus: Path | None = None) -> Scorecard:
    """Converts a run's model, and scores the new one; the run stays as it is.

    The new directory appears when the conversion is whole. When interrupted, the same command continues: trials of a
    budget are kept, and a whole conversion is only scored.

    Args:
      run: of a float model.
      options: what to do.
      out: the new directory. None: the run's, with the options in its name.
      corpus: for calibration and scores. None: that of the run.

    Raises:
      EfftrainError: the run, the corpus and the options do not fit, or ``out`` holds something else.
    """
    run = Path(run).resolve()
    config = load_model_config(run)
    if config.quantization.stored:
        raise ConfigError(f"the model of {run} is converted already; convert the one it was made from")
    settings = read_json(run / "config.json")
    if corpus is None and not settings.get("corpus"):
        raise ConfigError(f"the configuration of {run} names no corpus; give the one it was trained on with --corpus")
    text = Text(corpus or Path(settings["corpus"]), settings["training"]["length"])
    out = run.with_name(f"{run.name}-{options.name}") if out is None else out
    step = _newest_step(run, settings)
    made_from = {"run": str(run), "step": step, "corpus": str(text.corpus.resolve()), "options": to_json(options)}
    if out.exists():
        _check_made_from(out, made_from)
        console.print(f"{out} is converted already", markup=False)
        if (out / SCORECARD).exists():
            return Scorecard.read(out / SCORECARD)
        model = efftrain.load(out)
    else:
        model = _convert(run, config, options, text, out, settings, made_from)
    card = _score(out, model, text)
    card.write(out / SCORECARD)
    return card


@dataclass(frozen=True)
class Text:
    """Rows of a corpus, of so many tokens."""

    corpus: Path
    length: int

    def evaluator(self, max_rows: int | None = None) -> Evaluator:
        opened = data.open(self.corpus)
        max_batches = None if max_rows is None else -(-max_rows // 8)
        return Evaluator(lambda: self._batches("validation"), opened.token_bytes(), max_batches=max_batches)

    def calibration(self, rows: int) -> Calibration:
        """Rows of the training split."""
        batches = list(itertools.islice(self._batches("train"), -(-rows // 8)))
        if not batches:
            raise ConfigError(f"{self.corpus}: the training split is shorter than one row of {self.length} tokens")
        names = ("tokens", "segments", "positions")
        return Calibration(*(np.concatenate([b[name] for b in batches])[:rows] for name in names))

    def _batches(self, split: str):
        loader = data.LoaderConfig(
            corpora=(data.Part(path=self.corpus),),
            length=self.length,
            batch_size=8,
            split=split,
            shuffle=False,
            repeat=False,
        )
        return data.batches(loader, verify=False)


def _convert(run, config: ModelConfig, options: Compression, text: Text, out: Path, settings, made_from) -> Decoder:
    calibration = text.calibration(options.rows) if options.method != "nearest" else None
    cache = _format(options.cache) or config.quantization.cache
    chosen = None
    if options.budget is not None:
        formats = [parse_format(part) for part in options.quantize.split(",")]
        evaluate = text.evaluator(options.rows)
        kept = Kept(out, made_from)
        chosen = choose_formats(efftrain.load(run), formats, options.budget, lambda model: evaluate(model)["bpb"], kept)
        rules = chosen.rules
    else:
        kept, rules = None, _rules(options, config)
    quantization = Quantization(rules=rules, cache=cache)
    if quantization == Quantization():
        raise ConfigError(f"{run} was not trained for a quantisation; say what to do, such as --quantize int8")
    model, report = convert(
        Pieces.read(run), quantization, method=options.method, calibration=calibration, unrolled=chosen is not None
    )
    _write(out, run, model, report, settings, made_from | ({"choice": chosen.as_json()} if chosen else {}))
    if kept is not None:
        kept.remove()
    return model


def _rules(options: Compression, config: ModelConfig) -> tuple[QuantizationRule, ...]:
    """Those that the options say; what they leave open is as in training."""
    weights, activations = _format(options.quantize), _format(options.activations)
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


def _format(text: str | None) -> AnyFormat | None:
    return parse_format(text) if text else None


def _write(out: Path, run: Path, model: Decoder, report: Report, settings: dict, made_from: dict[str, Any]) -> None:
    """The new directory, under another name until it is whole."""
    unfinished = out.with_name(f"{out.name}.incomplete")
    try:
        if unfinished.is_dir() and _is_ours(unfinished):
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        changes = {"bytes_share": report.bytes_share, "matrices": report.as_json()}
        write_json(unfinished / FILE_NAME, made_from | changes)
        training = settings.get("training", {}) | {"checkpoints": None}
        write_json(unfinished / "config.json", settings | {"model": to_json(model.config), "training": training})
        write_json(unfinished / "environment.json", environment())
        if (run / "recipe.py").exists():
            shutil.copyfile(run / "recipe.py", unfinished / "recipe.py")
        _, params, rest = split_model(model)
        with Checkpoints(unfinished / "checkpoints") as checkpoints:
            checkpoints.save(made_from["step"], {"params": params, "model_state": rest}, None, None)
            checkpoints.wait()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free the disk or choose another --out") from error


def _is_ours(unfinished: Path) -> bool:
    """Left by a process that was killed: our file is the first that is written."""
    return (unfinished / FILE_NAME).exists() or all(p.name.startswith(FILE_NAME) for p in unfinished.iterdir())


def _check_made_from(out: Path, made_from: dict[str, Any]) -> None:
    if not (out / FILE_NAME).exists():
        raise RunError(f"{out} exists and is not a converted model; choose another --out")
    before = read_json(out / FILE_NAME)
    if any(before.get(name) != value for name, value in json.loads(json.dumps(made_from)).items()):
        raise RunError(f"{out} was made from another run, step or with other options; choose another --out")


def _newest_step(run: Path, settings: dict[str, Any]) -> int:
    with Checkpoints(checkpoint_directory(run, settings), read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise RunError(f"{run} holds no checkpoint; train it first")
    return steps[-1]


def _score(out: Path, model: Decoder, text: Text) -> Scorecard:
    card = score(
        model,
        name=out.name,
        length=text.length,
        quality=text.evaluator()(model),
        checkpoint=out / "checkpoints",
    )
    share = read_json(out / FILE_NAME)["bytes_share"]
    if share is not None:
        note = "quantised matrices with their scales, over float32"
        card = replace(card, figures=card.figures | {"quantized_bytes_share": Figure(share, "share", "counted", note)})
    return card
