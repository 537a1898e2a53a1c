"""Decontamination: documents of one side that repeat word n-grams of the other.

Two directions. Training documents that hold n-grams of an external evaluation set are removed from training, and
reported per set. Documents of validation and test that repeat training documents are removed from their split, so
that bits per byte are measured on text the model has not seen.

In both the index is made of the smaller side (the evaluation sets, or the held-out splits), and the training split
streams past it: 8 bytes per distinct n-gram of the index, whatever the size of the training split.

N-grams are compared by 64-bit hashes. With 10^9 n-grams against an index of 10^7, 5 * 10^-4 chance hits are expected;
with 32 bits it would be millions.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efftrain.data.batching import by_size
from efftrain.data.documents import Document
from efftrain.data.shingles import distinct, wide_shingle_hashes, without_repeats
from efftrain.data.sources import Source
from efftrain.data.splits import SPLITS
from efftrain.errors import ConfigError, CorpusError

# (hashes, offsets) of the n-grams of texts, as of ``shingles.shingle_hashes``.
Hasher = Callable[[list[bytes], int], tuple[np.ndarray, np.ndarray]]

_BLOCK = 256 << 10  # bytes of text that are hashed together
_TABLE_BITS = 26
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A test that the model will be judged by, under the name that reports give it."""

    name: str
    source: Source


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """What counts as contaminated.

    Published practice: 13-grams (Brown et al. 2020, appendix C; DCLM). GPT-3 removed a training document at the first
    hit and later cut it around the hits, because one quotation condemned whole books; datatrove removes it at the
    first hit. Llama 2 (Touvron et al. 2023, A.6) calls an evaluation sample clean below 20 % of its tokens, PaLM
    (Chowdhery et al. 2022) below 70 % of its 8-grams.

    Attributes:
      sets: evaluation sets that training must not see.
      n: words of an n-gram.
      limit: a training document goes where a larger share of its n-grams is in an evaluation set; 0 means at the
        first hit.
      held_out_limit: a document of validation or test goes where a larger share of its n-grams is in the training
        split.
      common: an n-gram that more training documents than this hold is a licence or a phrase and does not condemn a
        held-out document (GPT-3: 10). It does count against evaluation sets: a well-known question stands on more
        pages than that.
    """

    sets: tuple[EvaluationSet, ...] = ()
    n: int = 13
    limit: float = 0.0
    held_out_limit: float = 0.2
    common: int = 10

    def __post_init__(self):
        if self.n < 1:
            raise ConfigError(f"decontaminate.n is {self.n}; it must be at least 1")
        if self.common < 1:
            raise ConfigError(f"decontaminate.common is {self.common}; it must be at least 1")
        for name in ("limit", "held_out_limit"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"decontaminate.{name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        names = [item.name for item in self.sets]
        if taken := sorted({*names} & {*SPLITS}):
            raise ConfigError(f"decontaminate.sets has one named {taken[0]!r}, like a split; give it another name")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"decontaminate.sets has two sets named {min(twice)!r}; give each a name of its own")


class NgramIndex:
    """A set of n-gram hashes.

    Attributes:
      hashes: (n-grams,) uint64, sorted, each once.
    """

    def __init__(self, hashes: np.ndarray):
        """Takes sorted, distinct uint64 hashes; ``NgramIndex.build`` makes them of any."""
        self.hashes = hashes
        # Most n-grams of a stream are not in the index: a table of the upper bits answers for them with one access.
        bits = min(max(int(16 * len(hashes)).bit_length(), 8), _TABLE_BITS)
        self._shift = np.uint64(64 - bits)
        self._occupied = np.zeros(1 << bits, bool)
        for start in range(0, len(hashes), _CHUNK):  # the hashes may be a file larger than memory
            self._occupied[hashes[start : start + _CHUNK] >> self._shift] = True

    @classmethod
    def build(cls, arrays: Iterable[np.ndarray]) -> "NgramIndex":
        """Merges arrays of uint64 hashes, one in memory at a time; the peak is about three times the result."""
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
        """Writes the hashes as ``.npy``."""
        with path.open("wb") as file:
            np.save(file, self.hashes)

    @classmethod
    def load(cls, path: Path) -> "NgramIndex":
        """Maps what ``save`` wrote, so that processes share one copy in memory.

        Raises:
          CorpusError: the file is damaged or missing.
        """
        try:
            return cls(np.load(path, mmap_mode="r"))
        except (OSError, ValueError, EOFError) as error:
            raise CorpusError(f"the n-gram index {path} cannot be read ({error}); build the corpus again") from error


def hits(index: NgramIndex, hashes: np.ndarray) -> np.ndarray:
    """Looks n-grams up.

    Args:
      hashes: (n-grams,) uint64, in any order, with repeats.

    Returns:
      (n-grams,) int64: the position of each in ``index.hashes``, -1 where it is not there.
    """
    positions = np.full(len(hashes), -1, np.int64)
    if not len(index):
        return positions
    candidates = np.flatnonzero(index._occupied[hashes >> index._shift])
    candidates = candidates[np.argsort(hashes[candidates])]  # in order, neighbours of an index are still in the cache
    wanted = hashes[candidates]
    places = np.minimum(np.searchsorted(index.hashes, wanted), len(index) - 1)
    found = index.hashes[places] == wanted
    positions[candidates[found]] = places[found]
    return positions


def contamination(hashes: np.ndarray, offsets: np.ndarray, hit_hashes: NgramIndex) -> np.ndarray:
    """The share of each document's n-grams that the other side has, repeats counted.

    Args:
      hashes: (n-grams,) uint64 of the documents one after the other.
      offsets: (documents + 1,) int64; document i has ``hashes[offsets[i]:offsets[i + 1]]``.
      hit_hashes: n-grams of the other side.

    Returns:
      (documents,) float64 from 0 to 1; 0 for a document without an n-gram.
    """
    before = np.concatenate([[0], np.cumsum(hits(hit_hashes, hashes) >= 0)])
    return (before[offsets[1:]] - before[offsets[:-1]]) / np.maximum(np.diff(offsets), 1)


def document_counts(positions: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """In how many documents of a block each n-gram of an index occurs.

    Args:
      positions: (n-grams,) int64, what ``hits`` returned for the block.
      offsets: (documents + 1,) int64, as in ``contamination``.

    Returns:
      Positions in the index, each once, and how many documents have it; add them up over the blocks of the training
      split with ``totals[positions] += counts``.
    """
    found = np.flatnonzero(positions >= 0)
    n_documents = len(offsets) - 1
    documents = np.searchsorted(offsets, found, side="right") - 1
    pairs = distinct(positions[found] * n_documents + documents)  # each n-gram once in a document
    entries = pairs // max(n_documents, 1)
    first = np.flatnonzero(np.diff(entries, prepend=-1))
    return entries[first], np.diff(first, append=len(entries))


def seen_in_training(index: NgramIndex, totals: np.ndarray, common: int) -> NgramIndex:
    """The n-grams of the held-out splits that condemn a document: in the training split, but not common there.

    Args:
      index: n-grams of the held-out splits.
      totals: (n-grams of the index,) int64, in how many training documents each occurs.
      common: see ``Decontaminate``.
    """
    return NgramIndex(index.hashes[(totals > 0) & (totals <= common)])


@dataclass(frozen=True)
class EvaluationIndex:
    """The n-grams of an evaluation set.

    Attributes:
      documents: how many it has.
      short: how many of them have one n-gram or none. Where a document has fewer than n words, only a document of just
        these words has its n-gram: it is hardly protected.
    """

    name: str
    ngrams: NgramIndex
    documents: int
    short: int


def ngram_hashes(texts: list[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(n-grams,) uint64 and (texts + 1,) int64 offsets. A text of fewer words than n is one n-gram of all of them."""
    return wide_shingle_hashes(texts, n, None)


def hash_blocks(
    texts: Iterable[bytes], n: int, hasher: Hasher = ngram_hashes
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (hashes, offsets) of blocks of texts that are small enough to be hashed fast."""
    return (hasher(batch, n) for batch in by_size(texts, _BLOCK))


def index_evaluation_set(item: EvaluationSet, n: int, hasher: Hasher = ngram_hashes) -> EvaluationIndex:
    """Reads an evaluation set.

    Raises:
      CorpusError: something in it cannot be read, or it has no n-gram at all and would silently protect nothing.
    """
    documents = short = 0
    arrays = []
    for hashes, offsets in hash_blocks(_texts(item), n, hasher):
        arrays.append(distinct(hashes))
        documents += len(offsets) - 1
        short += int(np.count_nonzero(np.diff(offsets) <= 1))
    index = NgramIndex.build(arrays)
    if not len(index):
        raise CorpusError(f"the evaluation set {item.name!r} has no words; check its source and its text field")
    return EvaluationIndex(item.name, index, documents, short)


def _texts(item: EvaluationSet) -> Iterator[bytes]:
    for piece in item.source.pieces():
        for document in item.source.documents(piece):
            if not isinstance(document, Document):
                raise CorpusError(
                    f"{document.id} of the evaluation set {item.name!r} cannot be read ({document.detail}); mend it, "
                    "because what is not read cannot be kept out of training"
                )
            yield document.text.encode(errors="replace")


def _union(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    merged = np.concatenate([a, b])
    merged.sort(kind="stable")  # linear for two sorted runs
    return without_repeats(merged)
