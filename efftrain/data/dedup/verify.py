"""Decides which candidates of a component are removed, and for the sake of whom.

Components are joined by chance collisions and by chains: A is like B, B like C, C not like A. So a document goes only
where it is compared with the very document that stays, by the shingles themselves (leader clustering). Marin kept 2 of
859,092 documents of one source by removing whole components (marin-community/marin#6854).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np

from efftrain.data.dedup.minhash import MinHash, estimate


@dataclass(frozen=True)
class Match:
    """A document that is removed.

    Attributes:
      document: its number.
      survivor: the number of the document that stays for it.
      estimated: Jaccard similarity by signature.
      exact: the configured similarity by shingles.
      bands: in which the two agree; 0 where only others of the component joined them.
    """

    document: int
    survivor: int
    estimated: float
    exact: float
    bands: int


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """``|a & b| / |a | b|`` of two sorted arrays without repeats; 0 where both are empty."""
    shared = _n_shared(a, b)
    return shared / max(len(a) + len(b) - shared, 1)


def containment(part: np.ndarray, whole: np.ndarray) -> float:
    """``|part & whole| / |part|`` of two sorted arrays without repeats; 0 where the part is empty."""
    return _n_shared(part, whole) / max(len(part), 1)


def _n_shared(a: np.ndarray, b: np.ndarray) -> int:
    small, large = sorted((a, b), key=len)
    if not len(small):
        return 0
    places = np.searchsorted(large, small)
    places[places == len(large)] = 0
    return int(np.count_nonzero(large[places] == small))


def screen(config: MinHash) -> float:
    """Agreement of signatures below which no exact comparison is made: two standard deviations under the threshold.

    Containment has none: it can be high where the Jaccard similarity, which the signature estimates, is low.
    """
    tau = config.threshold
    return tau - 2 * sqrt(tau * (1 - tau) / config.n_permutations) if config.similarity == "jaccard" else 0.0


def leaders(
    numbers: np.ndarray,
    signatures: np.ndarray,
    shingle_sets: Callable[[int], np.ndarray],
    config: MinHash,
) -> list[Match]:
    """Finds the documents of one component that repeat a better one.

    One that is similar enough to a leader is removed in its favour; any other becomes a leader itself. Time and memory
    grow with the number of documents, not with its square: a document is compared with ``max_leaders`` leaders by
    signature (beyond so many leaders: with those that share most bands), and with the most agreeing
    ``max_comparisons`` of them by shingles.

    Args:
      numbers: (docs,) int64 document numbers, the best first: they are walked in this order, so that it decides who
        survives.
      signatures: (docs, K) uint32, row i of document ``numbers[i]``.
      shingle_sets: from a document number to its shingle hashes, sorted, without repeats: ``shingles.shingle_set``.
        Called where a document is compared; the sets of up to ``max_leaders`` leaders are kept for the next.
      config: threshold, similarity and limits.

    Returns:
      The removals, in the order of the walk. A survivor is never itself removed.
    """
    measure = jaccard if config.similarity == "jaccard" else containment
    limit = screen(config)
    found = _Leaders(signatures, config)
    set_of = lru_cache(maxsize=config.max_leaders)(lambda leader: shingle_sets(int(numbers[leader])))
    matches = []
    for row in range(len(numbers)):
        match = None
        nearest = found.nearest(row, limit)
        own = shingle_sets(int(numbers[row])) if nearest else None
        for leader, agreement in nearest:
            exact = measure(own, set_of(leader))
            if exact >= config.threshold and (match is None or exact > match.exact):
                bands = int((signatures[row] == signatures[leader]).reshape(config.bands, -1).all(axis=1).sum())
                match = Match(int(numbers[row]), int(numbers[leader]), agreement, exact, bands)
        if match is None:
            found.add(row)
        else:
            matches.append(match)
    return matches


class _Leaders:
    """The rows that stay, and those of them that are worth comparing with a document."""

    def __init__(self, signatures: np.ndarray, config: MinHash):
        self._signatures, self._config = signatures, config
        self._rows: list[int] = []
        self._buckets: dict[tuple[int, bytes], list[int]] = {}

    def add(self, row: int) -> None:
        self._rows.append(row)
        for key in self._bands(row):
            bucket = self._buckets.setdefault(key, [])
            if len(bucket) < self._config.max_leaders:
                bucket.append(row)

    def nearest(self, row: int, limit: float) -> list[tuple[int, float]]:
        """Up to ``max_comparisons`` leaders with their agreement, the most agreeing first, older ones before newer."""
        rows = self._rows
        if len(rows) > self._config.max_leaders:
            shared = Counter(leader for key in self._bands(row) for leader in self._buckets.get(key, ()))
            rows = [leader for leader, _ in shared.most_common(self._config.max_leaders)]
        if not rows:
            return []
        agreement = estimate(self._signatures[rows], self._signatures[row])
        best = np.argsort(-agreement, kind="stable")[: self._config.max_comparisons]
        return [(rows[i], float(agreement[i])) for i in best if agreement[i] >= limit]

    def _bands(self, row: int) -> list[tuple[int, bytes]]:
        width = 4 * self._config.rows
        signature = self._signatures[row].tobytes()
        return [(band, signature[band * width : (band + 1) * width]) for band in range(self._config.bands)]
