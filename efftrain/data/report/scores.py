"""Computes histograms of the scores of each rule, separately for kept and rejected documents."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.config import from_json
from efftrain.data.report.tables import SCORES, batches, column_names
from efftrain.data.rules.base import flatten, is_edit
from efftrain.errors import ConfigError

_NOT_RULES = ("id", "source", "bytes", "rejected_by")
_BINS = 60
_WIDE = 20  # ratio above which an axis is logarithmic


@dataclass(frozen=True)
class Interval:
    """The closed interval of the scores that a rule keeps."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def ends(self) -> tuple[float, ...]:
        return tuple(end for end in (self.low, self.high) if math.isfinite(end))

    def keeps(self, scores: np.ndarray) -> np.ndarray:
        """Returns which scores are in the interval, bool.

        The ends are rounded to the precision of the scores, so that a stored score equal to a threshold remains equal.
        """
        kind = scores.dtype.type
        return (scores >= kind(self.low)) & (scores <= kind(self.high))

    def __str__(self) -> str:
        low, high = number(self.low), number(self.high)
        if len(self.ends) == 2:
            return f"keeps {low} to {high}"
        return f"keeps at least {low}" if math.isfinite(self.low) else f"keeps at most {high}"


@dataclass(frozen=True)
class Histogram:
    """The histogram of the scores of one rule.

    Attributes:
      rule: name of the rule.
      interval: the scores that the rule keeps; None if its class cannot be imported here.
      edges: (bins + 1,) ascending; scores beyond them are counted in the first or last bin.
      logarithmic: whether the bins are equally wide in the logarithm of the score.
      kept, rejected: (bins,) number of documents that this rule, considered alone, keeps or rejects.
      n_kept, n_rejected: the total numbers; nan scores are counted as rejected.
    """

    rule: str
    interval: Interval | None
    edges: np.ndarray
    logarithmic: bool
    kept: np.ndarray
    rejected: np.ndarray
    n_kept: int
    n_rejected: int


def intervals(parameters: Mapping[str, Any]) -> dict[str, Interval]:
    """Returns the interval that each rule of a corpus configuration in JSON keeps, by the name of the rule.

    A rule that a script defines cannot be imported here and is omitted.
    """
    found = {}
    for written in parameters.get("rules", ()):
        try:
            rules = list(flatten([from_json(written)]))
        except ConfigError:
            continue
        for rule in rules:
            if not is_edit(rule) and (interval := _interval(rule)).ends:
                found[rule.name] = interval
    return found


def _interval(rule: Any) -> Interval:
    if hasattr(rule, "threshold"):
        return Interval(low=rule.threshold) if rule.keeps(math.inf) else Interval(high=rule.threshold)
    return Interval(getattr(rule, "low", -math.inf), getattr(rule, "high", math.inf))


def histograms(corpus: Path, kept: Mapping[str, Interval]) -> Iterator[Histogram]:
    """Yields the histogram of each rule in ``scores.parquet``. Its column is read twice, first for the range.

    Raises:
      CorpusError: the table is missing or damaged.
    """
    for rule in column_names(corpus, SCORES):
        if rule not in _NOT_RULES:
            yield _histogram(corpus, rule, kept.get(rule))


def _histogram(corpus: Path, rule: str, interval: Interval | None) -> Histogram:
    low, high, positive = math.inf, -math.inf, math.inf
    for scores in _scores(corpus, rule):
        finite = scores[np.isfinite(scores)]
        low, high = min(low, finite.min(initial=np.inf)), max(high, finite.max(initial=-np.inf))
        positive = min(positive, finite[finite > 0].min(initial=np.inf))
    ends = interval.ends if interval else ()
    edges, logarithmic = bin_edges(low, high, positive, ends)
    counts = np.zeros((2, len(edges) - 1), np.int64)
    n_kept = n_rejected = 0
    for scores in _scores(corpus, rule):
        keeps = interval.keeps(scores) if interval else np.isfinite(scores)
        n_kept, n_rejected = n_kept + int(keeps.sum()), n_rejected + int((~keeps).sum())
        for side, some in enumerate((scores[keeps], scores[~keeps])):
            counts[side] += np.histogram(some[~np.isnan(some)].clip(edges[0], edges[-1]), edges)[0]
    return Histogram(rule, interval, edges, logarithmic, counts[0], counts[1], n_kept, n_rejected)


def bin_edges(low: float, high: float, positive: float, ends: tuple[float, ...]) -> tuple[np.ndarray, bool]:
    """Chooses bins that cover the scores and the thresholds.

    Args:
      low: the smallest score.
      high: the largest score.
      positive: the smallest score above zero; inf if there is none.
      ends: the thresholds.

    Returns:
      (edges, whether they are equally spaced in the logarithm). Logarithmic bins are used if the largest score is many
      times the threshold, or if the threshold is large and scores begin far below it; scores of zero are then counted
      in the first bin.
    """
    low, high = min(low, *ends, math.inf), max(high, *ends, -math.inf)
    if not math.isfinite(low):
        low, high = 0.0, 1.0
    start, largest = min(positive, *(end for end in ends if end > 0), math.inf), max(ends, default=high)
    wide = high > _WIDE * largest > 0 or largest > _WIDE * max(positive, 1.0)
    if wide and low >= 0 and (start := max(start, high * 1e-9)) < high:
        return np.geomspace(start, high, _BINS + 1), True
    if 0 <= low < 0.5 * high:
        low = 0.0
    return np.linspace(low, high if high > low else low + 1.0, _BINS + 1), False


def number(value: float) -> str:
    """Formats a number with about four significant digits and a thousands separator; whole numbers in full."""
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _scores(corpus: Path, rule: str) -> Iterator[np.ndarray]:
    """Yields the scores of a rule in batches, with nan for null."""
    for batch in batches(corpus, SCORES, [rule]):
        yield batch.column(0).to_numpy(zero_copy_only=False)
