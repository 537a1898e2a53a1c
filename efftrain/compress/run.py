"""``efftrain compress``: reads a run directory and writes a run directory with the compressed model."""

from dataclasses import replace
from pathlib import Path

import efftrain
from efftrain.compress.commands.compression import Compression
from efftrain.compress.commands.prune import Prune
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.structured_prune import StructuredPrune
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.origin import FILE_NAME
from efftrain.compress.rounds import compress_in_rounds
from efftrain.compress.stage import make_stage
from efftrain.errors import ConfigError
from efftrain.lock import Lock, beside
from efftrain.measure.quality.held_out import HeldOut
from efftrain.measure.scorecard.score import score
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.measure.scorecard.scorecard import Figure, Scorecard
from efftrain.models.decoder import Decoder
from efftrain.models.zeros import zeros_share
from efftrain.sharding.hosts import check_single_process
from efftrain.train.run.directory import load_model_config, read_json, row_length
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.run.writing import writing


def compress(
    run: Path,
    options: Compression,
    *,
    out: Path | None = None,
    corpus: Path | None = None,
    length: int | None = None,
    evaluated_rows: int | None = None,
) -> Scorecard:
    """Compresses the model of a run into a new run directory and scores it; the original run is not changed.

    The new directory appears when the conversion is complete, or when its training begins; all stages before the last
    one are in ``OUT.stages``. If the command is interrupted, the same command continues: finished stages and trials are
    read and not repeated. Unfinished work of another version of the code is started again; finished work of another
    version raises an error.

    Args:
      run: directory of the run of a float model.
      options: the command: how the model is quantised or pruned.
      out: the new run directory. None: the directory of ``run`` with the options appended to its name.
      corpus: the corpus for calibration, training and evaluation. None: the corpus of the run.
      length: tokens of the rows that are read from it. None: as the run was trained.
      evaluated_rows: number of rows of the test split for the score; see ``measure.quality.held_out``. None: all.

    Returns:
      The scorecard of the new model.

    Raises:
      InUseError: another process is writing ``out``.
      EfftrainError: the run, the corpus and the options do not fit each other, or ``out`` holds something else.
    """
    check_single_process("a model is compressed")
    run = Path(run).resolve()
    config, settings = load_model_config(run), read_json(run / "config.json")
    if config.quantization.stored:
        raise ConfigError(f"the model of {run} is converted already; convert the one it was made from")
    if corpus is None and not settings.get("corpus"):
        raise ConfigError(f"the configuration of {run} names no corpus; give the one it was trained on with --corpus")
    text = CorpusRows(Path(corpus or settings["corpus"]).resolve(), row_length(run, settings, length))
    check_tokenizer(run, text.corpus)
    _check_model(run, options)  # fails before a stage is written
    if options.chosen_on:  # a split that is too short fails here, before anything is computed
        text.choosing(options.rows).batches()
    text.reporting(evaluated_rows, chosen=options.chosen_on)
    name = f"{run.name}-{options.name}{'' if length is None else f'-length{length}'}"
    out = run.with_name(name) if out is None else Path(out).resolve()
    with writing(out):
        lock = Lock(beside(out), out)
    with lock:
        return _compress(run, options, text, out, evaluated_rows)


def _compress(run: Path, options: Compression, text: CorpusRows, out: Path, evaluated_rows: int | None) -> Scorecard:
    match options:
        case Prune(recovery=RecoveryTraining() as recovery) | StructuredPrune(recovery=RecoveryTraining() as recovery):
            return compress_in_rounds(run, options, recovery, text, out, evaluated_rows)
    model = make_stage(run, options, text, out, evaluated_rows=evaluated_rows)
    if (out / SCORECARD).exists():
        return Scorecard.read(out / SCORECARD)
    card = _score(out, model or efftrain.load(out), text.reporting(evaluated_rows, chosen=options.chosen_on))
    card.write(out / SCORECARD)
    return card


def _check_model(run: Path, options: Compression) -> None:
    """Raises an error if a model to be trained has values that are not finite, or a model to be cut has zeros."""
    match options:
        case Prune(recovery=RecoveryTraining()):
            efftrain.load(run)
        case StructuredPrune() if share := zeros_share(efftrain.load(run)):
            raise ConfigError(
                f"{run} was pruned ({share:.0%} of the weights of its blocks are zero), and structured pruning would "
                "break the pattern of its zeros; make the dense run smaller first, and prune the smaller model"
            )


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
