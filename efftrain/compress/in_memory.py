"""Compression of a run's model in memory, for comparisons; ``compress.run`` writes a new run directory instead."""

from pathlib import Path

from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import PruneMethod, prune
from efftrain.compress.quantization.convert import Method, convert
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization
from efftrain.ops.masks import Structure
from efftrain.train.run.tokenizers import check_tokenizer


def convert_run(
    run: Path,
    text: CorpusRows | None,
    quantization: Quantization | None = None,
    method: Method = "rtn",
    *,
    rows: int = 128,
) -> Decoder:
    """Returns the model of a run with quantised weight storage; the run is not changed.

    Args:
      run: run directory of a float model, or of one trained for quantisation.
      text: the corpus for the calibration of "gptq" and "awq". None: no calibration, which "rtn" does not need.
      quantization: rules of the new model. None: those that the run was trained for.
      method: see ``convert``.
      rows: number of rows of the calibration text.

    Raises:
      ConfigError, RunError: see ``LayerwiseModel.read``, ``CorpusRows.calibration`` and ``convert``; or the tokenizer
        of the corpus is not that of the run.
    """
    if text is not None:
        check_tokenizer(run, text.corpus)
    pieces = LayerwiseModel.read(run)
    calibration = text.calibration(rows) if text is not None and method != "rtn" else None
    return convert(pieces, quantization or pieces.config.quantization, method=method, calibration=calibration)[0]


def prune_run(run: Path, text: CorpusRows, structure: Structure, method: PruneMethod, *, rows: int = 128) -> Decoder:
    """Returns the model of a run with weights set to zero, without training afterwards; the run is not changed.

    Args:
      run: run directory of a float model.
      text: the corpus for the calibration of "wanda" and "sparsegpt".
      structure: the pattern of the zeros.
      method: see ``prune``.
      rows: number of rows of the calibration text.

    Raises:
      ConfigError, RunError: see ``LayerwiseModel.read``, ``CorpusRows.calibration`` and ``prune``; or the tokenizer of
        the corpus is not that of the run.
    """
    check_tokenizer(run, text.corpus)
    calibration = None if method == "magnitude" else text.calibration(rows)
    return prune(LayerwiseModel.read(run), structure, method=method, calibration=calibration)[0]
