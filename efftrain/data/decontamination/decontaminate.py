"""Detects contamination: documents that share word n-grams with an evaluation set or with the training split.

There are two directions. Training documents that contain n-grams of an external evaluation set are removed from
training and reported per set. Documents of validation and test that repeat training documents are removed from their
split, so that bits per byte are measured on text that the model has not seen.

In both directions, the smaller side (an evaluation set, or the held-out splits) is indexed, and the training split is
streamed against the index. The memory is 8 bytes per distinct n-gram of the index, whatever the size of the training
split.

A text of an evaluation set that is shorter than an n-gram is searched for as a whole, with its own length; see
``Decontaminate``. Training documents are compared with evaluation sets in all variants of ``readings.readings``.

N-grams are compared by 64-bit hashes. For 10^9 n-grams and an index of 10^7, 5 * 10^-4 chance hits are expected; with
32 bits, there would be millions.
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
_MIN_N, _MAX_N = 8, 13  # Brown et al. 2020, appendix C

# Number of characters that are as specific as an English word: four for Thai, Lao, Tibetan, Myanmar and Khmer (whose
# characters begin with these bytes in UTF-8), two for Han, kana and Hangul. Thirteen characters are too few for an
# n-gram: the name of Thailand's capital has as many.
_CHARACTERS, _DENSE_CHARACTERS = {0xE0: 4, 0xE1: 4}, 2


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """An evaluation set that training must not contain.

    Attributes:
      name: the name in reports.
      source: the texts of the set.
    """

    name: str
    source: Source


@dataclass(frozen=True, kw_only=True)
class Decontaminate:
    """Configuration of decontamination.

    Published practice: n-grams have 13 words (Brown et al. 2020, appendix C; DCLM). GPT-3 first removed a training
    document at its first hit and later only cut out the hits, because a single quotation removed whole books; datatrove
    removes a document at its first hit. An evaluation sample is clean if fewer than 20 % of its tokens are contaminated
    (Llama 2: Touvron et al. 2023, A.6), or fewer than 70 % of its 8-grams (PaLM: Chowdhery et al. 2022).

    In scripts without spaces, whose shingles are characters, two characters (Han, kana, Hangul) or four (Thai, Lao,
    Tibetan, Myanmar, Khmer) count as one word wherever words of evaluation sets are counted.

    Attributes:
      sets: evaluation sets that training must not contain.
      n: number of words per n-gram. None: for each evaluation set, the 5th percentile of the numbers of words in its
        texts, but at least 8 and at most 13 (Brown et al. 2020); and 13 for the held-out splits.
      shortest: a text of an evaluation set that has fewer than n words, but at least this number, is searched for as a
        whole. A still shorter text ("What is love") is a phrase that occurs in unrelated documents; it is counted as
        ``short`` and only removes documents that consist of nothing else.
      threshold: a training document is removed if a larger fraction of its n-grams is in an evaluation set, taking the
        n-gram length and the variant of the text with the largest fraction. 0: a single hit removes it.
      held_out_threshold: a document of validation or test is removed if a larger fraction of its n-grams is in the
        training split.
      common: n-grams that occur in more training documents than this are licences or common phrases and do not count
        against a held-out document (GPT-3: 10). They do count against training documents that are compared with
        evaluation sets, because a well-known question may occur in more documents.
    """

    sets: tuple[EvaluationSet, ...] = ()
    n: int | None = None
    shortest: int = 5
    threshold: float = 0.0
    held_out_threshold: float = 0.2
    common: int = 10

    def __post_init__(self):
        for name in ("n", "shortest", "common"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"decontaminate.{name} is {value}; it must be at least 1")
        for name in ("threshold", "held_out_threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"decontaminate.{name} is {getattr(self, name)}; it is a share, from 0 to below 1")
        names = [item.name for item in self.sets]
        if taken := sorted({*names} & {*SPLITS}):
            raise ConfigError(
                f"decontaminate.sets has a set named {taken[0]!r}, which is the name of a split; give it another name"
            )
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"decontaminate.sets has two sets named {min(twice)!r}; give each a name of its own")

    @property
    def held_out_n(self) -> int:
        """Number of words per n-gram in the comparison of held-out splits with the training split."""
        return self.n or _MAX_N


def contamination(hashes: np.ndarray, offsets: np.ndarray, hit_hashes: NgramIndex) -> np.ndarray:
    """Returns the share of the n-grams of each document that are in an index, counting repetitions.

    Args:
      hashes: (n-grams,) uint64, the n-grams of all documents, concatenated.
      offsets: (documents + 1,) int64; document i has ``hashes[offsets[i]:offsets[i + 1]]``.
      hit_hashes: the index of the other side.

    Returns:
      (documents,) float64 from 0 to 1; 0 for a document without n-grams.
    """
    before = np.concatenate([[0], np.cumsum(hits(hit_hashes, hashes) >= 0)])
    return (before[offsets[1:]] - before[offsets[:-1]]) / np.maximum(np.diff(offsets), 1)


def document_counts(positions: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts the documents of a block in which each n-gram of an index occurs.

    Args:
      positions: (n-grams,) int64, the result of ``hits`` for the block.
      offsets: (documents + 1,) int64, as in ``decontamination.stages``.

    Returns:
      Distinct positions in the index, and the number of documents for each. Add them up over the blocks of the training
      split with ``totals[positions] += counts``.
    """
    found = np.flatnonzero(positions >= 0)
    n_documents = len(offsets) - 1
    documents = np.searchsorted(offsets, found, side="right") - 1
    pairs = distinct(positions[found] * n_documents + documents)  # count an n-gram once per document
    entries = pairs // max(n_documents, 1)
    first = np.flatnonzero(np.diff(entries, prepend=-1))
    return entries[first], np.diff(first, append=len(entries))


def seen_in_training(index: NgramIndex, totals: np.ndarray, common: int) -> NgramIndex:
    """Returns the n-grams of the held-out splits that occur in the training split but are not common there.

    Args:
      index: the n-grams of the held-out splits.
      totals: (n-grams of the index,) int64, the number of training documents in which each occurs.
      common: see ``Decontaminate``.
    """
    return NgramIndex(index.hashes[(totals > 0) & (totals <= common)])


@dataclass(frozen=True)
class EvaluationIndex:
    """The n-grams of an evaluation set.

    Attributes:
      name: the name of the set.
      ngrams: the index of its n-grams.
      documents: number of documents in the set.
      short: number of these that are shorter than ``Decontaminate.shortest`` and so hardly protected: only documents
        that consist of exactly these words are removed.
      n: number of words per n-gram of this set.
      lengths: the lengths of the n-grams in ``ngrams``, ascending: n, and the lengths for shorter texts and for scripts
        without spaces. Training documents are compared at each length.
    """

    name: str
    ngrams: NgramIndex
    documents: int
    short: int
    n: int
    lengths: tuple[int, ...]


def hash_blocks(texts: Iterable[bytes], n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (hashes, offsets), see ``wide_shingle_hashes``, for blocks of texts that are small enough to be fast."""
    return (wide_shingle_hashes(batch, n) for batch in by_size(texts, BLOCK))


def index_evaluation_set(item: EvaluationSet, config: Decontaminate) -> EvaluationIndex:
    """Reads an evaluation set and indexes its n-grams. It is read twice, because n depends on all of its texts.

    Raises:
      CorpusError: a part of the set cannot be read, or the set has no words, so that nothing would be compared.
    """
    counts = np.array([length_in_words(words(text)) for text in _texts(item)])
    if not counts.any():
        raise CorpusError(f"the evaluation set {item.name!r} has no words; check its source and its text field")
    n = config.n or int(np.clip(np.percentile(counts[counts > 0], 5), _MIN_N, _MAX_N))
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
    """Returns the number of words; characters of scripts without spaces are fractions, see ``Decontaminate``."""
    return sum(1 / _CHARACTERS.get(word[0], _DENSE_CHARACTERS) if is_character(word) else 1 for word in found)


def ngram_length(found: list[bytes], n: int, shortest: int) -> int:
    """Returns the n-gram length for a text of an evaluation set, in units of ``shingles.words``.

    Args:
      found: the units of the text: words, or characters of scripts without spaces.
      n: number of words per n-gram.
      shortest: see ``Decontaminate``.

    Returns:
      The number of units that correspond to n words, or to all words if there are fewer. For a text of fewer words than
      ``shortest``, a number larger than its number of units, so that the text is a single n-gram, which only a text of
      exactly these words has.
    """
    length = length_in_words(found)
    if length < shortest:
        return n * (len(found) // n + 1)
    per_word = round(len(found) / length)
    # In whole words, so that few distinct lengths occur: each one is compared with every training document.
    return min(n, len(found) // per_word) * per_word


def _texts(item: EvaluationSet) -> Iterator[bytes]:
    for piece in item.source.pieces():
        for document in item.source.documents(piece):
            if not isinstance(document, Document):
                raise CorpusError(
                    f"{document.id} of the evaluation set {item.name!r} cannot be read ({document.detail}); fix it, "
                    "because only text that can be read can be kept out of training"
                )
            yield document.text.encode(errors="replace")
