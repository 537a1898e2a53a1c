"""Comparison of variants of an experiment with the same seeds and data: mean and spread of each figure."""

import contextlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from efftrain.config import digest, finite_json
from efftrain.errors import CorpusError
from efftrain.experiment.experiment import Experiment, finished, reported
from efftrain.measure.measurements import Measurements
from efftrain.measure.quality.held_out import reporting
from efftrain.measure.scorecard.scorecard import Figure, Scorecard, amount
from efftrain.progress import console
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.environment import environment

LAST_ROWS = 50  # number of rows of the training metrics over which the figures of the last steps are averaged
COLUMNS = ("bpb", "train_flops", "train_tokens_per_s", "parameters_active", "parameters_total", "decode_s_per_token_b1")


@dataclass(frozen=True)
class Comparison:
    """The scorecards of several variants, each trained with several seeds.

    Attributes:
      seeds: seeds of parameters and data; runs with the same seed read the same batches.
      cards: the scorecards of each variant, by its name, in the order of the seeds.
      last: mean of each training metric over the last rows of the log: variant -> metric -> one value per seed.
    """

    seeds: tuple[int, ...]
    cards: Mapping[str, list[Scorecard]]
    last: Mapping[str, dict[str, list[float]]]

    def mean(self, variant: str, figure: str) -> float:
        """Mean of a figure over the seeds."""
        return statistics.fmean(self._values(variant, figure))

    def spread(self, variant: str, figure: str) -> float:
        """Sample standard deviation of a figure over the seeds; 0 if there is only one seed."""
        return _sd(self._values(variant, figure))

    def gap(self, better: str, worse: str, figure: str = "bpb") -> tuple[float, float]:
        """How far ``better`` is below ``worse``, paired by seed: mean and sample standard deviation of the gaps."""
        pairs = zip(self._values(better, figure), self._values(worse, figure), strict=True)
        gaps = [high - low for low, high in pairs]
        return statistics.fmean(gaps), _sd(gaps)

    def as_json(self) -> dict[str, Any]:
        """All figures that every run has, with mean, spread and values; environments of this process and the runs."""

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
        """Writes all figures as JSON, with further results of the comparison, and prints the latter."""
        path.write_text(json.dumps(finite_json(self.as_json() | more), indent=1, allow_nan=False) + "\n")
        console.print(json.dumps(finite_json(more), indent=1), markup=False)

    @contextlib.contextmanager
    def measuring(self, out: Path, name: str, code: Mapping[str, str]) -> Generator[dict[int, Measurements]]:
        """Opens a store for further measurements of the runs of each seed, so that they are not repeated after a stop.

        The stores are removed at the end of the block, in which the result must be written; if an error ends the block,
        they stay.

        Args:
          out: the folder of the stores.
          name: name of the measurements; the stores are ``NAME-seedN.json`` with the suffix of ``Measurements``.
          code: ``code_identity`` of the code that measures. A store of other code or other scorecards is not used.

        Yields:
          The store of each seed.
        """
        with contextlib.ExitStack() as stack:
            stores: dict[int, Measurements] = {}
            for i, seed in enumerate(self.seeds):
                cards = {variant: digest(asdict(of_seeds[i])) for variant, of_seeds in self.cards.items()}
                stores[seed] = stack.enter_context(Measurements(out / f"{name}-seed{seed}.json", cards, code))
            yield stores
            for store in stores.values():
                store.remove()

    def table(self) -> Table:
        """A table with a row per variant; figures are shown as mean and standard deviation."""
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
        """The figure of each seed; NaN if a run has no value, such as the quality of a run that diverged."""
        return [card.value(figure) for card in self.cards[variant]]


def on_test(card: Scorecard, config: Experiment, *, rows: int | None = None) -> Scorecard:
    """The scorecard of a run with its quality on the test split, which was not used during training.

    Args:
      card: scorecard of the run.
      config: configuration of the run.
      rows: number of rows of the split. None: all.
    """
    return reported(card, config.out, config.corpus, config.training, rows=rows)


def compare(
    variants: Mapping[str, Experiment],
    train: Callable[[Experiment], Scorecard],
    *,
    out: Path,
    seeds: Sequence[int],
    complete: Callable[[Experiment], Experiment] = lambda config: config,
    report: Callable[[Scorecard, Experiment], Scorecard] = on_test,
) -> Comparison:
    """Trains every variant with every seed, one after the other, in ``out/VARIANT-seedN``, and compares them.

    An interrupted comparison continues: finished runs are read, and unfinished runs continue from their checkpoint. To
    share the work, several processes may each take some of the seeds; a last call with all seeds then reads the runs.

    Args:
      variants: complete configurations by name; ``out`` and the seed of each are replaced.
      train: trains one configuration and returns its scorecard.
      out: the folder of the runs.
      seeds: the seeds of every variant.
      complete: completes a configuration with what depends on its directory and seed.
      report: returns a scorecard with the quality that is compared. The default measures it on the test split; see
        ``on_test``.

    Returns:
      The comparison.

    Raises:
      ConfigError: a corpus has neither a test split nor a validation split.
      RunError: a directory holds a run of another configuration, of other inputs, or a finished one of other code.
    """
    for variant in variants.values():  # a missing split must fail before anything is trained
        with contextlib.suppress(CorpusError):  # ``train`` reports a corpus that cannot be opened
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
    """Sample standard deviation; 0 for a single value, NaN if a value is NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _last_figures(run: Path) -> dict[str, float]:
    rows = read_metrics(run)[-LAST_ROWS:]
    names = [name for name in rows[-1] if isinstance(rows[-1][name], float)]
    return {name: statistics.fmean(row[name] for row in rows if row.get(name) is not None) for name in names}


def equal_quality_flops(points: Sequence[tuple[float, float]], bpb: float) -> float | None:
    """FLOPs at which a family of models reaches a given quality, interpolated linearly in log FLOPs.

    Args:
      points: (FLOPs, bits per byte) of each member, in any order; more FLOPs give fewer bits per byte.
      bpb: bits per byte of the model that is compared.

    Returns:
      The FLOPs. None if the quality is better than that of the best member or worse than that of the worst.
    """
    ordered = sorted(points)
    for (less, high), (more, low) in itertools.pairwise(ordered):
        if low <= bpb <= high and low < high:
            share = (high - bpb) / (high - low)
            return math.exp(math.log(less) + share * (math.log(more) - math.log(less)))
    return None
