"""Provides a set of n-gram hashes on disk that several processes can share."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from efftrain.data.dedup.shingles import distinct, without_repeats
from efftrain.errors import CorpusError

_TABLE_BITS = 26
_CHUNK = 1 << 20


class NgramIndex:
    """A set of n-gram hashes with a fast membership test.

    Attributes:
      hashes: (n-grams,) uint64, sorted and distinct.
    """

    def __init__(self, hashes: np.ndarray, occupied: np.ndarray | None = None):
        """Creates the index from sorted, distinct uint64 hashes; use ``NgramIndex.build`` for hashes in any order.

        Args:
          hashes: (n-grams,) uint64, sorted and distinct.
          occupied: the table that ``save`` wrote for these hashes. None: it is computed.
        """
        self.hashes = hashes
        # Most n-grams of a stream are not in the index. A table of the upper bits rejects most of them with one access.
        self._occupied = _occupied(hashes) if occupied is None else occupied
        self._shift = np.uint64(65 - len(self._occupied).bit_length())

    @classmethod
    def build(cls, arrays: Iterable[np.ndarray]) -> "NgramIndex":
        """Merges arrays of uint64 hashes, one in memory at a time; the peak memory is about three times the result."""
        runs: list[np.ndarray] = []
        for array in arrays:
            runs.append(distinct(array))
            while len(runs) > 1 and len(runs[-2]) <= 2 * len(runs[-1]):
                runs.append(_union(runs.pop(), runs.pop()))
        while len(runs) > 1:
            runs.append(_union(runs.pop(), runs.pop()))
        return cls(runs[0] if runs else np.empty(0, np.uint64))

    def __len__(self) -> int:
        return len(self.hashes)

    def __getstate__(self) -> np.ndarray:
        return np.asarray(self.hashes)

    def __setstate__(self, hashes: np.ndarray) -> None:
        self.__init__(hashes)

    def save(self, path: Path) -> None:
        """Writes the hashes as ``.npy``, and the table for fast look-ups to a second file beside it."""
        for name, array in ((path, self.hashes), (_table_path(path), self._occupied)):
            with name.open("wb") as file:
                np.save(file, array)

    @classmethod
    def load(cls, path: Path) -> "NgramIndex":
        """Memory-maps the files that ``save`` wrote, so that processes share one copy and nothing is recomputed.

        Raises:
          CorpusError: a file is damaged or missing.
        """
        try:
            return cls(np.load(path, mmap_mode="r"), np.load(_table_path(path), mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise CorpusError(f"the n-gram index {path} cannot be read ({error}); build the corpus again") from error


def hits(index: NgramIndex, hashes: np.ndarray) -> np.ndarray:
    """Looks up n-grams in an index.

    Args:
      index: the index.
      hashes: (n-grams,) uint64, in any order, possibly repeated.

    Returns:
      (n-grams,) int64, the position of each n-gram in ``index.hashes``, or -1.
    """
    positions = np.full(len(hashes), -1, np.int64)
    if not len(index):
        return positions
    candidates = np.flatnonzero(index._occupied[hashes >> index._shift])
    candidates = candidates[np.argsort(hashes[candidates])]  # sorted, so that successive look-ups hit the cache
    wanted = hashes[candidates]
    places = np.minimum(np.searchsorted(index.hashes, wanted), len(index) - 1)
    found = index.hashes[places] == wanted
    positions[candidates[found]] = places[found]
    return positions


def _occupied(hashes: np.ndarray) -> np.ndarray:
    """Returns the table of upper bits, (a power of two,) bool, True for bits that occur."""
    bits = min(max(int(16 * len(hashes)).bit_length(), 8), _TABLE_BITS)
    occupied = np.zeros(1 << bits, bool)
    for start in range(0, len(hashes), _CHUNK):  # the hashes may be a mapped file that is larger than memory
        occupied[hashes[start : start + _CHUNK] >> np.uint64(64 - bits)] = True
    return occupied


def _table_path(path: Path) -> Path:
    return path.with_suffix(".occupied.npy")


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    merged = np.concatenate([a, b])
    merged.sort(kind="stable")  # linear for two sorted runs
    return without_repeats(merged)
