"""``efftrain compress``."""

import sys
from pathlib import Path
from typing import Literal

from rich.console import Console


def compress(
    run: Path,
    /,
    *,
    quantize: str | None = None,
    activations: str | None = None,
    cache: str | None = None,
    layers: str = "blocks/.*",
    method: Literal["nearest", "gptq", "awq", "magnitude", "wanda", "sparsegpt"] | None = None,
    budget: float | None = None,
    rows: int = 128,
    sparsity: str | None = None,
    slim: float | None = None,
    way: Literal["width", "depth", "any"] = "width",
    by: Literal["parameters", "flops", "latency"] = "parameters",
    search: int | None = None,
    recover: int = 0,
    rounds: int = 1,
    distill: bool = False,
    out: Path | None = None,
    corpus: Path | None = None,
) -> None:
    """Make a smaller model from that of a run, in a run directory of its own: fewer bits, weights, or a smaller shape.

    Such as: efftrain compress runs/dense --quantize int4:g32 --method gptq; --sparsity 0.5; --slim 0.33 --recover
    400000. When interrupted, the same command continues. Only --slim makes a model faster: JAX has no sparse products,
    neither for single zeros nor for 2:4.

    Args:
      run: the directory of a training run.
      quantize: number format of the weights: int8, int4:g32, fp8, ternary:g32, where g32 means that 32 numbers share a
        scale (by default all those of an output). By default the format that the run was trained for. With a budget:
        several, such as int8,int4:g32.
      activations: number format of the inputs of the weights, such as int8, with one scale per token; by default float.
      cache: number format of keys and values in decoding, such as int8; by default float.
      layers: a regular expression for the names of matrices, such as blocks/.*/mlp/.* or blocks/.*|embedding.
      method: to quantise: round to nearest (nearest, the default), or use the inputs on calibration text (gptq, awq).
        To prune: by size (magnitude), by size and inputs (wanda), or with compensation in the remaining weights
        (sparsegpt, the default).
      budget: bytes of the blocks' matrices as a share of float32; each layer gets the format that it can bear.
      rows: rows of calibration text, or of each trial of a budget.
      sparsity: weights that become zero: a share, such as 0.5, or 2:4. Fewer bytes on disk, no speed.
      slim: share to cut off by structured pruning, such as 0.33: the least important units, heads and channels. Faster.
      way: cut width (better quality) or depth (better latency); any: a search over both.
      by: slim is a share of the parameters, of training FLOPs, or of the time to decode one row.
      search: number of shapes to try, each trained with a tenth of the tokens of recover.
      recover: tokens of training after the cut; a twentieth to a tenth of what the run was trained on.
      rounds: number of rounds in which to cut and train, for 50 % and more.
      distill: in that training, learn from the original run instead of the text.
      out: the new run directory; by default the run's name with these options.
      corpus: corpus for calibration and training; by default that of the run.
    """
    from efftrain.compress.options import Compression
    from efftrain.compress.run import compress as compress_run
    from efftrain.measure.scorecard.scorecard import table

    options = Compression(
        quantize=quantize,
        activations=activations,
        cache=cache,
        layers=layers,
        method=method,
        budget=budget,
        rows=rows,
        sparsity=sparsity,
        slim=slim,
        way=way,
        by=by,
        search=search,
        recover=recover,
        rounds=rounds,
        distill=distill,
    )
    card = compress_run(run, options, out=out, corpus=corpus)
    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(table([card]))
