"""``efftrain compress``: quantize, prune, structured. Only the last one makes a model faster on every device."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from efftrain.errors import ConfigError

if TYPE_CHECKING:
    from efftrain.compress.commands.compression import Compression
    from efftrain.compress.commands.recovery_training import RecoveryTraining


def quantize(
    run: Path,
    /,
    *,
    weights: str | None = None,
    activations: str | None = None,
    cache: str | None = None,
    layers: str = "blocks/.*",
    method: Literal["rtn", "gptq", "awq"] = "rtn",
    budget: float | None = None,
    rows: int = 128,
    out: Path | None = None,
    corpus: Path | None = None,
    length: int | None = None,
) -> None:
    """Store a run's model in fewer bits (post-training quantisation), in a run directory of its own.

    Such as: efftrain compress quantize runs/dense --weights int4:g32 --method gptq. Without formats, the model is
    stored as it was trained (QAT), or without its zeros. When interrupted, the same command continues.

    Args:
      run: the directory of a training run.
      weights: number format of the weights: int8, int4:g32, fp8, ternary:g32, where g32 means that 32 numbers share a
        scale (by default all numbers of an output). By default the format that the run was trained for. With a budget:
        several, such as int8,int4:g32.
      activations: number format of the inputs of the weights, such as int8, with one scale per token; by default float.
      cache: number format of keys and values in decoding, such as int8; by default float.
      layers: a regular expression for the names of matrices, such as blocks/.*/mlp/.* or blocks/.*|embedding.
      method: round to nearest (rtn), or use the inputs on calibration text (gptq, awq).
      budget: bytes of the blocks' matrices as a share of float32; sensitive layers get formats with more bits.
      rows: rows of calibration text, or of each trial of a budget.
      out: the new run directory; by default the run's name with these options.
      corpus: corpus for calibration and evaluation; by default that of the run.
      length: tokens per row of the corpus; by default as in the run's training. An imported run needs it.
    """
    from efftrain.compress.commands.quantize import Quantize

    options = Quantize(
        weights=weights,
        activations=activations,
        cache=cache,
        layers=layers,
        method=method,
        budget=budget,
        rows=rows,
    )
    _compress(run, options, out, corpus, length)


def prune(
    run: Path,
    /,
    *,
    sparsity: str,
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt",
    weights: str | None = None,
    activations: str | None = None,
    layers: str = "blocks/.*",
    rows: int = 128,
    recovery_tokens: int | None = None,
    rounds: int = 1,
    distill: bool = False,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    out: Path | None = None,
    corpus: Path | None = None,
    length: int | None = None,
) -> None:
    """Set weights of a run's model to zero (unstructured or n:m pruning), in a run directory of its own.

    Such as: efftrain compress prune runs/dense --sparsity 0.5. This makes no model faster: JAX has no sparse products,
    neither for single zeros nor for 2:4. When interrupted, the same command continues.

    Args:
      run: the directory of a training run.
      sparsity: weights that become zero: a share, such as 0.5, or 2:4. Fewer bytes on disk, no speed.
      method: by size (magnitude), by size and inputs (wanda), or with compensation in the remaining weights
        (sparsegpt).
      weights: with sparsegpt, quantise the remaining weights too: int8, int4:g32, fp8, ternary:g32; by default float.
      activations: with sparsegpt, number format of the inputs of the weights, such as int8; by default float.
      layers: a regular expression for the names of matrices, such as blocks/.*/mlp/.*.
      rows: rows of calibration text.
      recovery_tokens: tokens of training after pruning (healing); zeros stay zero. By default none.
      rounds: number of rounds in which to prune and train.
      distill: in that training, learn from the original run instead of the text.
      learning_rate: peak learning rate of that training; by default a part of the run's. An imported run needs it.
      batch_size: rows per step of that training; by default as in the run. An imported run needs it.
      out: the new run directory; by default the run's name with these options.
      corpus: corpus for calibration and training; by default that of the run.
      length: tokens per row of the corpus; by default as in the run's training. An imported run needs it.
    """
    from efftrain.compress.commands.prune import Prune

    options = Prune(
        sparsity=sparsity,
        method=method,
        weights=weights,
        activations=activations,
        layers=layers,
        rows=rows,
        recovery=_recovery(recovery_tokens, rounds, distill, learning_rate, batch_size),
    )
    _compress(run, options, out, corpus, length)


def structured(
    run: Path,
    /,
    *,
    ratio: float,
    axis: Literal["width", "depth", "any"] = "width",
    metric: Literal["parameters", "flops", "latency"] = "parameters",
    search: int | None = None,
    rows: int = 128,
    recovery_tokens: int | None = None,
    rounds: int = 1,
    distill: bool = False,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    out: Path | None = None,
    corpus: Path | None = None,
    length: int | None = None,
) -> None:
    """Make a run's model smaller and faster (structured pruning), in a run directory of its own.

    Such as: efftrain compress structured runs/dense --ratio 0.33 --recovery-tokens 400000. The least important units,
    heads, channels or layers are removed. When interrupted, the same command continues.

    Args:
      run: the directory of a training run.
      ratio: share to remove, such as 0.33.
      axis: prune width (better quality) or depth (better latency); any: a search over both.
      metric: ratio is a share of the parameters, of training FLOPs, or of the time to decode one row.
      search: number of shapes to try, each trained with a tenth of the recovery tokens.
      rows: rows of calibration text, or of each trial of a search.
      recovery_tokens: tokens of training after pruning (healing); a twentieth to a tenth of what the run was trained
        on. By default none.
      rounds: number of rounds in which to prune and train, for 50 % and more.
      distill: in that training, learn from the original run instead of the text.
      learning_rate: peak learning rate of that training; by default a part of the run's. An imported run needs it.
      batch_size: rows per step of that training; by default as in the run. An imported run needs it.
      out: the new run directory; by default the run's name with these options.
      corpus: corpus for calibration and training; by default that of the run.
      length: tokens per row of the corpus; by default as in the run's training. An imported run needs it.
    """
    from efftrain.compress.commands.structured_prune import StructuredPrune

    options = StructuredPrune(
        ratio=ratio,
        axis=axis,
        metric=metric,
        search=search,
        rows=rows,
        recovery=_recovery(recovery_tokens, rounds, distill, learning_rate, batch_size),
    )
    _compress(run, options, out, corpus, length)


def _recovery(
    tokens: int | None, rounds: int, distill: bool, learning_rate: float | None, batch_size: int | None
) -> "RecoveryTraining | None":
    from efftrain.compress.commands.recovery_training import RecoveryTraining

    how = {"rounds": rounds, "distill": distill, "learning_rate": learning_rate, "batch_size": batch_size}
    if tokens is not None:
        return RecoveryTraining(tokens=tokens, **how)
    without_effect = {"rounds": 1, "distill": False, "learning_rate": None, "batch_size": None}
    if given := [name for name, value in how.items() if value != without_effect[name]]:
        raise ConfigError(
            f"--{given[0].replace('_', '-')} has no effect without recovery training; add --recovery-tokens with a "
            "number of tokens"
        )
    return None


def _compress(run: Path, options: "Compression", out: Path | None, corpus: Path | None, length: int | None) -> None:
    from efftrain.compress.run import compress
    from efftrain.measure.scorecard.scorecard import table

    card = compress(run, options, out=out, corpus=corpus, length=length)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table([card]))
