"""Variants of an experiment side by side: the same seeds and data for all, the mean and the spread of each figure."""

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from efftrain.config import finite_json
from efftrain.errors import CorpusError
from efftrain.experiment.experiment import Experiment, finished, reported
from efftrain.measure.quality.held_out import reporting
from efftrain.measure.scorecard.scorecard import Figure, Scorecard, amount
from efftrain.progress import console
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import environment

LAST_ROWS = 50  # training rows behind the figures of the last steps
COLUMNS = ("bpb", "train_flops", "train_tokens_per_s", "parameters_active", "parameters_total", "decode_s_per_token_b1")


@dataclass(frozen=True)
class Comparison:
    """Scorecards of variants, those of a variant in the order of the seeds.

    Attributes:
      seeds: of parameters and data; variants with one seed read the same batches.
      cards: variant -> its scorecards.
      last: variant -> training figure -> its mean over the last rows, for each seed.
    """

    seeds: tuple[int, ...]
    cards: Mapping[str, list[Scorecard]]
    last: Mapping[str, dict[str, list[float]]]

    def mean(self, variant: str, figure: str) -> float:
        """Over the seeds."""
        return statistics.fmean(self._values(variant, figure))

    def spread(self, variant: str, figure: str) -> float:
        """Sample standard deviation over the seeds; 0 where there is one."""
        return _sd(self._values(variant, figure))

    def gap(self, better: str, worse: str, figure: str = "bpb") -> tuple[float, float]:
        """By how much ``better`` is below ``worse``, seed by seed: mean, and sample standard deviation."""
        pairs = zip(self._values(better, figure), self._values(worse, figure), strict=True)
        gaps = [high - low for low, high in pairs]
        return statistics.fmean(gaps), _sd(gaps)

    def as_json(self) -> dict[str, Any]:
        """Every figure that all seeds have, with its values; the environment of this process and of the runs."""

        def rows(name: str) -> dict[str, Any]:
            first, *others = self.cards[name]
            cards = (first, *others)
            shared = [f for f in first.figures if all(f in c.figures and c.figures[f].value is not None for c in cards)]
            return {
                f: {
                    "mean": self.mean(name, f),
                    "sd": self.spread(name, f),
                    "values": self._values(name, f),
                    "unit": first.figures[f].unit,
                    "method": first.figures[f].method,
                    **({"split": first.figures[f].split} if first.figures[f].split else {}),
                }
                for f in shared
            }

        return {
            "seeds": list(self.seeds),
            "environment": environment(),
            "runs": {name: [card.environment for card in cards] for name, cards in self.cards.items()},
            "variants": {name: rows(name) for name in self.cards},
            "last_steps": {name: dict(figures) for name, figures in self.last.items()},
        }

    def write(self, path: Path, **more: Any) -> None:
        path.write_text(json.dumps(finite_json(self.as_json() | more), indent=1, allow_nan=False) + "\n")

    def table(self) -> Table:
        """A row a variant, figures as mean and spread."""
        splits = sorted({card.figures["bpb"].split for cards in self.cards.values() for card in cards} - {""})
        caption = f"mean +- standard deviation over seeds {', '.join(map(str, self.seeds))}"
        rows = Table("model", caption="; ".join([caption, *(f"quality on the {split} split" for split in splits)]))
        for name in COLUMNS:
            rows.add_column(name.replace("_", " "), justify="right")
        for variant, cards in self.cards.items():
            rows.add_row(variant, *(self._cell(variant, cards, name) for name in COLUMNS))
        return rows

    def _cell(self, variant: str, cards: Sequence[Scorecard], name: str) -> str:
        if any(card.figures[name].value is None for card in cards):
            return "not measured"
        figure = cards[0].figures[name]

        def show(value: float) -> str:
            return amount(Figure(value, figure.unit, figure.method))

        mean, spread = self.mean(variant, name), self.spread(variant, name)
        return f"{show(mean)} +- {show(spread)}" if figure.method == "measured" else show(mean)

    def _values(self, variant: str, figure: str) -> list[float]:
        """NaN where a run has none, such as the quality of one that diverged."""
        return [card.value(figure) for card in self.cards[variant]]


def on_test(card: Scorecard, config: Experiment) -> Scorecard:
    """The card of a run with its quality on the test split, which nobody has looked at while it was trained."""
    return reported(card, config.out, config.corpus, config.training)


def compare(
    variants: Mapping[str, Experiment],
    train: Callable[[Experiment], Scorecard],
    *,
    out: Path,
    seeds: Sequence[int],
    complete: Callable[[Experiment], Experiment] = lambda config: config,
    report: Callable[[Scorecard, Experiment], Scorecard] = on_test,
) -> Comparison:
    """Runs what has not been run, one after the other, in ``out/VARIANT-seedN``.

    An interrupted comparison continues: runs that have a scorecard are read, the others go on from their checkpoint.
    Several processes may share the work by seeds; a last one reads them all.

    Args:
      variants: complete configurations by name; ``out`` and the seed of each are replaced.
      train: makes the scorecard of one.
      complete: what is known of a configuration only with its directory and seed.
      report: gives a card the quality that is compared. By default on the test split, see ``on_test``.

    Raises:
      ConfigError: a corpus has neither a test split nor a validation split.
      RunError: a directory holds a run of another configuration, of other inputs, or a finished one of other code.
    """
    for variant in variants.values():  # before anything is trained
        with contextlib.suppress(CorpusError):  # one that cannot be opened is the business of whoever trains
            reporting(variant.corpus, variant.training.length)
    cards: dict[str, list[Scorecard]] = {name: [] for name in variants}
    last: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    for i, seed in enumerate(seeds):
        for name, variant in variants.items():
            seeded = replace(variant, out=out / f"{name}-seed{seed}", training=replace(variant.training, seed=seed))
            config = complete(seeded)
            console.print(f"{name}, seed {seed} ({i + 1} of {len(seeds)})", markup=False)
            cards[name].append(report(finished(config) or train(config), config))
            for figure, value in _last_figures(config.out).items():
                last[name].setdefault(figure, []).append(value)
    return Comparison(tuple(seeds), cards, last)


def _sd(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of one value, NaN where a value is none."""
    if any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _last_figures(run: Path) -> dict[str, float]:
    rows = read_metrics(run)[-LAST_ROWS:]
    names = [name for name in rows[-1] if isinstance(rows[-1][name], float)]
    return {name: statistics.fmean(row[name] for row in rows if row.get(name) is not None) for name in names}


def equal_quality_flops(points: Sequence[tuple[float, float]], bpb: float) -> float | None:
    """FLOPs at which a family of models reaches ``bpb``, between its members straight in log FLOPs.

    Args:
      points: (FLOPs, bpb) of each member, in any order; more FLOPs give a lower bpb.
      bpb: of the model that is compared.

    Returns:
      None where the quality lies outside of the family: better than its best, or worse than its worst.
    """
    ordered = sorted(points)
    for (less, high), (more, low) in itertools.pairwise(ordered):
        if low <= bpb <= high and low < high:
            share = (high - bpb) / (high - low)
            return math.exp(math.log(less) + share * (math.log(more) - math.log(less)))
    return None
