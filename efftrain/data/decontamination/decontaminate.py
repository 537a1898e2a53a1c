"""Decontamination: documents of one side that repeat word n-grams of the other.

Two directions. Training documents that hold n-grams of an external evaluation set are removed from training, and
reported per set. Documents of validation and test that repeat training documents are removed from their split, so
that bits per byte are measured on text the model has not seen.

In both the index is made of the smaller side (the evaluation sets, or the held-out splits), and the training split
streams past it: 8 bytes per distinct n-gram of the index, whatever the size of the training split.

A text of an evaluation set that is shorter than an n-gram is looked for as a whole, at its own length; see
``Decontaminate``. Training documents are compared with evaluation sets in every reading of ``readings``.

N-grams are compared by 64-bit hashes. With 10^9 n-grams against an index of 10^7, 5 * 10^-4 chance hits are expected;
with 32 bits it would be millions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from efftrain.data.batching import by_size
from efftrain.data.decontamination.ngram_index import NgramIndex, hits
from efftrain.data.decontamination.readings import readings
from efftrain.data.dedup.shingles import distinct, is_character, ngram_hashes, wide_shingle_hashes, words
from efftrain.data.documents import Document
from efftrain.data.sources.base import Source
from efftrain.data.splits import SPLITS
from efftrain.errors import ConfigError, CorpusError

BLOCK = 256 << 10  # bytes of text that are hashed together
_LEAST_N, _MOST_N = 8, 13  # Brown et al. 2020, appendix C

# Characters that say about as much as a word of English: of Thai, Lao, Tibetan, Myanmar and Khmer (which begin with
# these bytes in UTF-8) four, of Han, kana and Hangul two. Thirteen characters of Thai are the name of its capital.
_CHARACTERS, _DENSE_CHARACTERS = {0xE0: 4, 0xE1: 4}, 2


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

    In scripts without spaces, whose shingles are characters, two characters (Han, kana, Hangul) or four (Thai,
    Lao, Tibetan, Myanmar, Khmer) count as one word wherever words of evaluation sets are counted.

    Attributes:
      sets: evaluation sets that training must not see.
      n: words of an n-gram. None takes for each evaluation set the 5th percentile of its texts' numbers of words, but
        at least 8 and at most 13 (Brown et al. 2020), and 13 for the held-out splits.
      shortest: a text of an evaluation set with fewer than n words, but at least as many as this, is looked for as a
        whole: a training document with all its words in a row holds it. A still shorter one ("What is love") is a
        phrase that innocent documents share; it counts as ``short`` and only removes a document that consists of it.
      limit: a training document goes where a larger share of its n-grams is in an evaluation set, by the length of
        n-gram and the reading with the largest share; 0 means at the first hit.
      held_out_limit: a document of validation or test goes where a larger share of its n-grams is in the training
        split.
      common: an n-gram that more training documents than this hold is a licence or a phrase and does not condemn a
        held-out document (GPT-3: 10). It does count against evaluation sets: a well-known question stands on more
        pages than that.
    """

    sets: tuple[EvaluationSet, ...] = ()
    n: int | None = None
    shortest: int = 5
    limit: float = 0.0
    held_out_limit: float = 0.2
    common: int = 10

    def __post_init__(self):
        for name in ("n", "shortest", "common"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"decontaminate.{name} is {value}; it must be at least 1")
        for name in ("limit", "held_out_limit"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"decontaminate.{name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        names = [item.name for item in self.sets]
        if taken := sorted({*names} & {*SPLITS}):
            raise ConfigError(f"decontaminate.sets has one named {taken[0]!r}, like a split; give it another name")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"decontaminate.sets has two sets named {min(twice)!r}; give each a name of its own")

    @property
    def held_out_n(self) -> int:
        """Words of an n-gram where held-out splits are compared with training."""
        return self.n or _MOST_N


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
      short: how many of them are shorter than ``Decontaminate.shortest`` and so hardly protected: only a document that
        consists of just these words is removed.
      n: words of an n-gram of this set.
      lengths: of the n-grams in ``ngrams``, rising: n, and what shorter texts and scripts without spaces need. A
        training document is looked up at each of them.
    """

    name: str
    ngrams: NgramIndex
    documents: int
    short: int
    n: int
    lengths: tuple[int, ...]


def hash_blocks(texts: Iterable[bytes], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (hashes, offsets), as of ``wide_shingle_hashes``, of blocks of texts that are small enough to be fast."""
    return (wide_shingle_hashes(batch, n) for batch in by_size(texts, BLOCK))


def index_evaluation_set(item: EvaluationSet, config: Decontaminate) -> EvaluationIndex:
    """Reads an evaluation set, twice: its n depends on all of its texts.

    Raises:
      CorpusError: something in it cannot be read, or it has no n-gram at all and would silently protect nothing.
    """
    counts = np.array([length_in_words(words(text)) for text in _texts(item)])
    if not counts.any():
        raise CorpusError(f"the evaluation set {item.name!r} has no words; check its source and its text field")
    n = config.n or int(np.clip(np.percentile(counts[counts > 0], 5), _LEAST_N, _MOST_N))
    shortest = min(config.shortest, n)
    arrays, lengths = [], set()
    for batch in by_size(_texts(item), BLOCK):
        forms = [form for text in batch for form in readings(text)]
        own = np.array([ngram_length(words(form), n, shortest) for form in forms])
        lengths.update(own.tolist())
        for length, hashes, offsets in ngram_hashes(forms, own.tolist()):
            arrays.append(distinct(hashes[np.repeat(own == length, np.diff(offsets))]))
    short = int(np.count_nonzero(counts < shortest))
    return EvaluationIndex(item.name, NgramIndex.build(arrays), len(counts), short, n, tuple(sorted(lengths)))


def length_in_words(found: list[bytes]) -> float:
    """The number of words, of which characters of scripts without spaces are parts; see ``Decontaminate``."""
    return sum(1 / _CHARACTERS.get(word[0], _DENSE_CHARACTERS) if is_character(word) else 1 for word in found)


def ngram_length(found: list[bytes], n: int, shortest: int) -> int:
    """How many units in a row, as ``shingles.words`` cuts them, stand for a text of an evaluation set.

    Args:
      found: its units.
      n: words of an n-gram.
      shortest: see ``Decontaminate``.

    Returns:
      Units of n words, or of all words where there are fewer. For a text of fewer words than ``shortest``, more than
      it has: it is one n-gram, which only a text of just these words shares.
    """
    length = length_in_words(found)
    if length < shortest:
        return n * (len(found) // n + 1)
    per_word = round(len(found) / length)
    # In whole words, so that few lengths occur: each has its price, for every training document.
    return min(n, len(found) // per_word) * per_word


def _texts(item: EvaluationSet) -> Iterator[bytes]:
    for piece in item.source.pieces():
        for document in item.source.documents(piece):
            if not isinstance(document, Document):
                raise CorpusError(
                    f"{document.id} of the evaluation set {item.name!r} cannot be read ({document.detail}); mend it, "
                    "because what is not read cannot be kept out of training"
                )
            yield document.text.encode(errors="replace")
