"""Shows how often a mixture repeats each of its corpora at a given token budget, before a run starts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from efftrain.data import corpus as corpora
from efftrain.errors import ConfigError
from efftrain.progress import console

if TYPE_CHECKING:
    from efftrain.data.loading.loader import LoaderConfig, Part

REPEATS = 4.0
"""Epochs up to which repeated text is nearly as good as new; then its value decays (Muennighoff et al. 2023)."""


def epochs(weights: Sequence[float], sizes: Sequence[int], n_tokens: int) -> list[float]:
    """Returns the number of epochs over each part of a mixture.

    Args:
      weights: share of the tokens that come from each part, relative to the others; positive.
      sizes: number of tokens in each part.
      n_tokens: number of tokens that the run trains on, over all parts.

    Returns:
      ``n_tokens * weight / sum(weights) / size`` for each part.

    Raises:
      ConfigError: a weight or a size is not positive.
    """
    for weight, size in zip(weights, sizes, strict=True):
        if not (weight > 0 and size > 0):
            raise ConfigError(f"a part of the mixture has weight {weight} and {size} tokens; both must be positive")
    return [n_tokens * weight / sum(weights) / size for weight, size in zip(weights, sizes, strict=True)]


def mixture_table(config: "LoaderConfig", n_tokens: int) -> tuple[Table, list[str]]:
    """Returns the table and the warnings of ``show_mixture``.

    Raises:
      CorpusError: a corpus is missing.
      ConfigError: a corpus lacks the split.
    """
    weights = [part.weight for part in config.corpora]
    sizes = [_n_tokens(part, config) for part in config.corpora]
    if config.repeat:
        repeats = epochs(weights, sizes, n_tokens)
    else:  # each row is read once, whatever the weights
        weights, repeats, n_tokens = sizes, [1.0] * len(sizes), sum(sizes)
    table = Table(title=f"mixture: {n_tokens:,} tokens of {config.split}", title_justify="left")
    table.add_column("corpus")
    for column in ("share", "tokens to read", "tokens there", "epochs"):
        table.add_column(column, justify="right")
    for part, weight, size, repeat in zip(config.corpora, weights, sizes, repeats, strict=True):
        share = weight / sum(weights)
        table.add_row(str(part.path), f"{share:.1%}", f"{repeat * size:,.0f}", f"{size:,}", f"{repeat:,.2f}")
    n_rows = [repeat * size / config.length for repeat, size in zip(repeats, sizes, strict=True)]
    warnings = [
        _too_few(part, rows, n_tokens // config.length)
        for part, rows in zip(config.corpora, n_rows, strict=True)
        if rows < 1 and config.repeat
    ]
    return table, warnings + [
        _warning(part.path, repeat) for part, repeat in zip(config.corpora, repeats, strict=True) if repeat > REPEATS
    ]


def show_mixture(config: "LoaderConfig", n_tokens: int) -> None:
    """Prints the share, tokens and epochs of each corpus, and warnings.

    There is a warning for each corpus that is repeated more than four times, and for each corpus whose share is less
    than one row.

    Args:
      config: the configuration of the loader; with ``repeat=False`` each corpus is read once, whatever the budget.
      n_tokens: number of tokens that the run trains on: steps * batch_size * length.

    Raises:
      CorpusError: a corpus is missing.
      ConfigError: a corpus lacks the split.
    """
    table, warnings = mixture_table(config, n_tokens)
    console.print(table)
    for line in warnings:
        console.print(line, markup=False, style="yellow")


def _n_tokens(part: "Part", config: "LoaderConfig") -> int:
    n_tokens, n_rows = corpora.open(part.path, verify=False).n_tokens(config.split), part.n_rows()
    return n_tokens if n_rows is None else min(n_tokens, n_rows * config.length)


def _too_few(part: "Part", rows: float, n_rows: int) -> str:
    return (
        f"warning: weight {part.weight:g} of {part.path} amounts to {rows:.2g} of the run's {n_rows:,} rows, so that "
        "possibly no row is read from it; raise its weight, train on more tokens, or remove it from the mixture"
    )


def _warning(path: Path, repeats: float) -> str:
    return (
        f"warning: {path} is repeated {repeats:.1f} times; after {REPEATS:g} epochs, repeated text improves a "
        "model little (Muennighoff et al. 2023): lower its weight, add text, or train on fewer tokens"
    )
