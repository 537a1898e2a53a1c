"""Scores texts with a linear classifier on hashed words and word pairs, fast enough for every document of a corpus.

The model is that of fastText (Joulin et al. 2017, 1607.01759) without its hidden layer; such a classifier was the key
step of DCLM (Li et al. 2024, 2406.11794). ``train.classifier`` trains it and writes the file of weights.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np

from efftrain.data.dedup.shingles import shingle_hashes
from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast
from efftrain.data.storage.shards import sync
from efftrain.errors import ConfigError, CorpusError

N_BUCKETS = 1 << 18
FORMAT = 2  # 2: words are normalised beyond ASCII
# The features of this text are stored with the weights, to detect weights that were trained on other features.
_PROBE = (
    "def area(width, height):\n    return width * height  # 1st naïve über-version, 数据\n"
    "ÉCOLE e\u0301cole “don’t”—a\u00a0b so\u00adft ＡＢ１，ｶﾞ Straße ﬁne ½ 한국어 ไทย नमस्ते ΣΊΣΥΦΟΣ ☺\n"
).encode()


@dataclass(frozen=True, kw_only=True)
class NgramClassifier(AtLeast):
    """Keeps texts that resemble the good training examples more than the raw ones. Create it with ``load``.

    Score: the probability of the class "good", assuming that good and raw texts are equally frequent. A useful
    threshold depends on the raw text: DCLM kept the best tenth, and ``thresholds`` in the training report has the score
    for that. The file is read once per process.

    Attributes:
      weights: the file that ``train.classifier.train_classifier`` wrote.
      digest: digest of the weights, so that scores of other weights are never reused.
      threshold: lowest probability at which a text is kept.

    Raises:
      CorpusError: (by ``score``) the file is missing, damaged, or contains other weights.
    """

    name: ClassVar[str] = "ngram_classifier"
    weights: Path
    digest: str
    threshold: float = 0.5

    @classmethod
    def load(cls, weights: Path | str, *, threshold: float = 0.5) -> "NgramClassifier":
        """Creates the rule for the present content of a file of weights."""
        return cls(weights=Path(weights), digest=read_weights(Path(weights)).digest, threshold=threshold)

    def score(self, text: Text) -> float:
        return float(_checked_weights(self.weights, self.digest).probabilities([text.utf8])[0])


@dataclass(frozen=True)
class LinearWeights:
    """The weights of the classifier.

    Attributes:
      weights: (buckets,) float32.
      bias: the logit of a text without words.
    """

    weights: np.ndarray
    bias: float

    @property
    def digest(self) -> str:
        """blake2b digest of the content, 32 hexadecimal digits."""
        head = np.array([FORMAT, len(self.weights)], "<i8").tobytes() + np.array([self.bias], "<f4").tobytes()
        return hashlib.blake2b(head + self.weights.astype("<f4").tobytes(), digest_size=16).hexdigest()

    def probabilities(self, texts: Sequence[bytes]) -> np.ndarray:
        """Returns the probability of the class "good" for each UTF-8 text, (texts,) float64."""
        buckets, values, offsets = ngram_features(texts, len(self.weights))
        owners = np.repeat(np.arange(len(texts)), np.diff(offsets))
        logits = self.bias + np.bincount(owners, self.weights[buckets] * values, minlength=len(texts))
        return np.exp(-np.logaddexp(0.0, -logits))  # the sigmoid without overflow


def ngram_features(texts: Sequence[bytes], n_buckets: int = N_BUCKETS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts hashed words and pairs of adjacent words; the counts of each text are scaled to Euclidean length one.

    fastText uses the mean instead. With length one, short and long documents need weights of the same scale, so that a
    plain L2 penalty suits both. ``dedup.shingles`` defines what a word is and how much of a long text is read.

    Args:
      texts: UTF-8.
      n_buckets: a power of two from 2 to 2**31. The counts of n-grams that share a bucket are added.

    Returns:
      The features of all texts, concatenated: buckets (m,) int32, ascending and unique within a text; values (m,)
      float32; and offsets (texts + 1,) int64. The features of text i are those from offsets[i] to offsets[i + 1].
    """
    if not 2 <= n_buckets <= 1 << 31 or n_buckets & (n_buckets - 1):
        raise ConfigError(f"classifier.n_buckets is {n_buckets}; it must be a power of two from 2 to 2**31")
    keys = np.sort(np.concatenate([_keys(texts, n, n_buckets) for n in (1, 2)]))
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    counts = np.diff(first, append=len(keys)).astype(np.float64)
    owners, buckets = keys[first] >> 32, keys[first] & 0xFFFFFFFF
    norms = np.sqrt(np.bincount(owners, counts**2, minlength=len(texts)))
    offsets = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=len(texts)))])
    return buckets.astype(np.int32), (counts / norms[owners]).astype(np.float32), offsets.astype(np.int64)


def _keys(texts: Sequence[bytes], n: int, n_buckets: int) -> np.ndarray:
    """Returns the index of the text and the bucket of each n-gram, packed into one int64."""
    hashes, offsets = shingle_hashes(texts, n)
    # Multiplicative hashing (Knuth 6.4) uses the top bits. Adding n gives a word and a pair of equal hash two buckets.
    mixed = (hashes + np.uint32(n)) * np.uint32(0x9E3779B1)
    buckets = mixed >> np.uint32(33 - n_buckets.bit_length())
    owners = np.repeat(np.arange(len(texts), dtype=np.int64), np.diff(offsets))
    return owners << 32 | buckets.astype(np.int64)


def write_weights(path: Path, linear: LinearWeights) -> None:
    """Writes weights to a file, atomically. Equal weights give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = path.with_name(f"{path.name}.incomplete")
    with incomplete.open("wb") as file:
        np.savez(
            file,
            format=np.int64(FORMAT),
            n_buckets=np.int64(len(linear.weights)),
            weights=linear.weights.astype(np.float32),
            bias=np.float32(linear.bias),
            digest=np.array(linear.digest),
            probe=_probe(len(linear.weights)),
        )
    sync(incomplete)
    os.replace(incomplete, path)


def read_weights(path: Path) -> LinearWeights:
    """Reads a file that ``write_weights`` wrote.

    Raises:
      CorpusError: the file is missing, damaged, has another format, or is from a version that hashes words differently.
    """
    try:
        # The stream is opened here because np.load does not close a damaged file that it opened itself.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = {name: file[name] for name in ("format", "n_buckets", "weights", "bias", "digest", "probe")}
    except FileNotFoundError as error:
        raise CorpusError(f"there is no classifier {path}; train one with efftrain.train.classifier") from error
    except Exception as error:  # a damaged archive raises many types: of the archive, its headers, Python's parser
        raise CorpusError(f"{path} is not a classifier, or damaged ({error}); train it again") from error
    if found["format"] != FORMAT:
        raise CorpusError(
            f"{path} has classifier format {found['format']}, but this version reads format {FORMAT}; train it again"
        )
    linear = LinearWeights(found["weights"], float(found["bias"]))
    if linear.weights.shape != (found["n_buckets"],) or linear.digest != found["digest"]:
        raise CorpusError(f"{path} is damaged (its content has another digest); train it again")
    if not np.array_equal(found["probe"], _probe(len(linear.weights))):
        raise CorpusError(f"{path} was trained by a version of efftrain that hashes words differently; train it again")
    return linear


@lru_cache(maxsize=4)
def _checked_weights(path: Path, digest: str) -> LinearWeights:
    linear = read_weights(path)
    if linear.digest != digest:
        raise CorpusError(
            f"{path} holds other weights than those the rule was made with (expected {digest[:8]}.., found "
            f"{linear.digest[:8]}..); make the rule again with NgramClassifier.load"
        )
    return linear


def _probe(n_buckets: int) -> np.ndarray:
    return ngram_features([_PROBE], n_buckets)[0]
