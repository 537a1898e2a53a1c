"""A linear classifier on hashed words and word pairs: one learned quality signal, cheap enough for every document.

The form is fastText's (Joulin et al. 2017, 1607.01759) without its hidden layer; such a classifier was the key step of
DCLM (Li et al. 2024, 2406.11794). ``train.classifier`` makes the file of weights that is read here.
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
# Its features are kept with the weights: weights that were trained with other features would be silently wrong.
_PROBE = (
    "def area(width, height):\n    return width * height  # 1st naïve über-version, 数据\n"
    "ÉCOLE e\u0301cole “don’t”—a\u00a0b so\u00adft ＡＢ１，ｶﾞ Straße ﬁne ½ 한국어 ไทย नमस्ते ΣΊΣΥΦΟΣ ☺\n"
).encode()


@dataclass(frozen=True, kw_only=True)
class NgramClassifier(AtLeast):
    """Keeps texts that look like the good examples more than like the raw ones. Made by ``NgramClassifier.load``.

    Score: the probability of "good", if good and raw texts were equally frequent. Where to cut depends on the raw
    text: DCLM kept the best tenth, and the training report's ``limits`` has the score for that. The file is read once
    per process.

    Attributes:
      weights: the file that ``train.classifier.train_classifier`` wrote.
      digest: of its content, so that scores made with other weights are not taken for these.

    Raises:
      CorpusError: (by ``score``) the file is missing, damaged, or holds other weights.
    """

    name: ClassVar[str] = "ngram_classifier"
    weights: Path
    digest: str
    limit: float = 0.5

    @classmethod
    def load(cls, weights: Path | str, *, limit: float = 0.5) -> "NgramClassifier":
        """The rule for the weights as they are now."""
        return cls(weights=Path(weights), digest=read_weights(Path(weights)).digest, limit=limit)

    def score(self, text: Text) -> float:
        return float(_checked_weights(self.weights, self.digest).probabilities([text.utf8])[0])


@dataclass(frozen=True)
class LinearWeights:
    """``weights``: (buckets,) float32. ``bias``: the logit of a text without a word."""

    weights: np.ndarray
    bias: float

    @property
    def digest(self) -> str:
        """blake2b of the content, 32 hexadecimal digits."""
        head = np.array([FORMAT, len(self.weights)], "<i8").tobytes() + np.array([self.bias], "<f4").tobytes()
        return hashlib.blake2b(head + self.weights.astype("<f4").tobytes(), digest_size=16).hexdigest()

    def probabilities(self, texts: Sequence[bytes]) -> np.ndarray:
        """The probability of "good" of each text, (texts,) float64."""
        buckets, values, offsets = ngram_features(texts, len(self.weights))
        owners = np.repeat(np.arange(len(texts)), np.diff(offsets))
        logits = self.bias + np.bincount(owners, self.weights[buckets] * values, minlength=len(texts))
        return np.exp(-np.logaddexp(0.0, -logits))  # no overflow at either end


def ngram_features(texts: Sequence[bytes], n_buckets: int = N_BUCKETS) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts of hashed words and pairs of neighbouring words, each text's scaled to Euclidean length one.

    fastText takes the mean instead; with length one, the weights of a document of ten words and of one of ten thousand
    are on one scale, so a plain L2 penalty fits both. What a word is, and how much of a long text is read, is said in
    ``shingles``.

    Args:
      texts: UTF-8.
      n_buckets: a power of two from 2 to 2**31. Different n-grams that share a bucket are added up.

    Returns:
      Of all texts one after the other: buckets (m,) int32, ascending and unique in a text; values (m,) float32; and
      offsets (texts + 1,) int64: the features of text i are those from offsets[i] to offsets[i + 1].
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
    """Number of the text and bucket of each n-gram, in one int64."""
    hashes, offsets = shingle_hashes(texts, n)
    # Multiplicative hashing (Knuth 6.4) takes the top bits; the sum keeps words and pairs apart.
    mixed = (hashes + np.uint32(n)) * np.uint32(0x9E3779B1)
    buckets = mixed >> np.uint32(33 - n_buckets.bit_length())
    owners = np.repeat(np.arange(len(texts), dtype=np.int64), np.diff(offsets))
    return owners << 32 | buckets.astype(np.int64)


def write_weights(path: Path, linear: LinearWeights) -> None:
    """Writes the file, whole or not at all; the same weights give the same bytes."""
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
    """Reads what ``write_weights`` wrote.

    Raises:
      CorpusError: the file is missing, damaged, of another format, or of a version that hashes words differently.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:  # NumPy leaves a damaged one open
            found = {name: file[name] for name in ("format", "n_buckets", "weights", "bias", "digest", "probe")}
    except FileNotFoundError as error:
        raise CorpusError(f"there is no classifier {path}; train one with efftrain.train.classifier") from error
    except Exception as error:  # of a damaged archive: errors of the archive, of its headers, of Python's parser, ...
        raise CorpusError(f"{path} is not a classifier, or damaged ({error}); train it again") from error
    if found["format"] != FORMAT:
        raise CorpusError(
            f"{path} has classifier format {found['format']} and this version reads {FORMAT}; train it again"
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
            f"{path} holds other weights than the rule was made with (expected {digest[:8]}.., found "
            f"{linear.digest[:8]}..); make the rule again with NgramClassifier.load"
        )
    return linear


def _probe(n_buckets: int) -> np.ndarray:
    return ngram_features([_PROBE], n_buckets)[0]
