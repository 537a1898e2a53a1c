"""Decides which candidates of a component are removed as duplicates, and of which kept document (leader clustering).

A component also contains documents that only chance collisions and chains connect: A resembles B and B resembles C, but
C does not resemble A. A document is therefore removed only after a comparison of its shingles with those of the
document that is kept for it. Removing whole components can empty a source (marin-community/marin#6854).
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
    """A document that is removed as a duplicate.

    Attributes:
      document: the number of the removed document.
      survivor: the number of the kept document.
      estimated: Jaccard similarity, estimated from the signatures.
      exact: the configured similarity, computed from the shingles.
      bands: number of bands in which the two agree; 0 if only other documents of the component connect them.
    """

    document: int
    survivor: int
    estimated: float
    exact: float
    bands: int


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Returns ``|a & b| / |a | b|`` of two sorted arrays without repetitions; 0 if both are empty."""
    shared = _n_shared(a, b)
    return shared / max(len(a) + len(b) - shared, 1)


def containment(part: np.ndarray, whole: np.ndarray) -> float:
    """Returns ``|part & whole| / |part|`` of two sorted arrays without repetitions; 0 if ``part`` is empty."""
    return _n_shared(part, whole) / max(len(part), 1)


def _n_shared(a: np.ndarray, b: np.ndarray) -> int:
    small, large = sorted((a, b), key=len)
    if not len(small):
        return 0
    places = np.searchsorted(large, small)
    places[places == len(large)] = 0
    return int(np.count_nonzero(large[places] == small))


def screen(config: MinHash) -> float:
    """Returns the agreement of signatures below which no exact comparison is made.

    It is two standard deviations below the threshold. For containment it is 0, because containment can be high although
    the Jaccard similarity, which signatures estimate, is low.
    """
    tau = config.threshold
    return tau - 2 * sqrt(tau * (1 - tau) / config.n_permutations) if config.similarity == "jaccard" else 0.0


def leaders(
    numbers: np.ndarray,
    signatures: np.ndarray,
    shingle_sets: Callable[[int], np.ndarray],
    config: MinHash,
) -> list[Match]:
    """Finds the documents of one component that duplicate a better one.

    Documents are visited in order. One that is similar enough to a leader is removed; any other becomes a leader, which
    is kept. Time and memory are linear in the number of documents: a document is compared by signature with at most
    ``max_leaders`` leaders (those with the most bands in common, if there are more), and by shingles with the
    ``max_comparisons`` of them whose signatures agree most.

    Args:
      numbers: (docs,) int64 document numbers, the best first; the order decides which documents are kept.
      signatures: (docs, K) uint32, row i is that of document ``numbers[i]``.
      shingle_sets: function from a document number to its shingle hashes, sorted and distinct, see
        ``shingles.shingle_set``. It is called only for comparisons, and the sets of up to ``max_leaders`` leaders are
        cached.
      config: threshold, similarity and limits.

    Returns:
      The removals, in the order of the visits. A kept document of a match is never removed itself.
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
            assert own is not None  # because there is a nearest leader
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
    """The rows of the leaders, and a search for those that are likely to be similar to a document."""

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
        """Returns up to ``max_comparisons`` leaders with their agreement, the highest first, older before newer."""
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
