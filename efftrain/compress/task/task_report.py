"""Figures of models on a task over several seeds: their means and spreads, and a table."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from efftrain.measure.scorecard.scorecard import Figure, show

UNITS = {"parameters": "parameters", "bytes": "B", "latency_s": "s", "flops": "FLOP"}
COLUMNS = ("accuracy", "macro_f1", "ece", "exact_match", *UNITS)


def summary(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation of each figure, and its ``values``.

    Args:
      values: the figures of a model, for each seed.
    """
    return {
        name: {
            "mean": statistics.fmean(v[name] for v in values),
            "sd": statistics.stdev([v[name] for v in values]) if len(values) > 1 else 0.0,
            "values": [v[name] for v in values],
        }
        for name in values[0]
    }


def task_table(models: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> Table:
    """A table with a row per model.

    Args:
      models: the ``summary`` of each model, by its name.
      seeds: the seeds.
    """
    caption = f"test; mean +- standard deviation over seeds {', '.join(map(str, seeds))}"
    rows = Table("model", box=SIMPLE_HEAD, padding=0, caption=caption)
    names = [name for name in COLUMNS if any(name in figures for figures in models.values())]
    for name in names:
        rows.add_column(name.removesuffix("_s").replace("_", " "), justify="right")

    def cell(figures: Mapping[str, Any], name: str) -> str:
        if name not in figures:
            return "-"
        mean, spread = figures[name]["mean"], figures[name]["sd"]
        if name in UNITS:
            return show(Figure(mean, UNITS[name], "measured")).replace(" parameters", "")
        return f"{mean:.3f}" + (f"+-{spread:.3f}" if len(seeds) > 1 else "")

    for model, figures in models.items():
        rows.add_row(model, *(cell(figures, name) for name in names))
    return rows
