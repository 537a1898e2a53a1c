"""Computes MinHash signatures of many texts at once, bit for bit equal to those of datasketch.

    hashes, offsets = document_hashes(texts, config)
    rows = signatures(hashes, offsets, config)

The share of columns in which two signatures agree estimates the Jaccard similarity J of the shingles of the two texts,
with standard deviation ``sqrt(J (1 - J) / K)`` for K columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from efftrain.data.dedup.shingles import MAX_BYTES, sha1_hashes, shingle_hashes
from efftrain.errors import ConfigError

EMPTY = np.uint32(0xFFFFFFFF)
"""Every value in the signature of a document without shingles, as in datasketch. Such documents match no other."""

_BLOCK, _PERMUTATIONS = 18_000, 8  # a buffer of 576 kB, half of a typical second-level cache

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(hashes (m,) uint32, offsets (docs + 1,) int64 strictly ascending, a (K,), b (K,) uint32) -> (docs, K) uint32."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """Configuration of near-duplicate detection with MinHash.

    The default is 16 bands of 7 rows. A pair of similarity s becomes a candidate with probability
    ``1 - (1 - s^7)^16``: .12 at 0.5, .36 at 0.6, .75 at 0.7, .90 at 0.75, .98 at 0.8, .998 at 0.85. FineWeb's 14 bands
    of 8 rows, on the same 112 permutations, find .77 at 0.75. Pairs that are no candidates are never found, whereas an
    unnecessary candidate only costs one exact comparison.

    Numbers are words like any other. Texts that differ only in their numbers (invoices, logs, tables, exercises) are
    kept if the numbers are dense enough to change most shingles; datatrove, which masks numbers, removes them.

    A text of fewer words than ``shingle`` is a single shingle, and duplicates another text only if all words are equal.
    In a text a few times as long, one changed word changes ``shingle`` shingles and so most of them, and the text is
    kept.

    Attributes:
      n_permutations: length of a signature; must be a multiple of ``bands``.
      bands: number of bands. Two documents are compared if all rows of one band agree.
      shingle: number of words per shingle.
      seed: seed of the permutations.
      threshold: exact similarity from which a document is removed.
      similarity: ``jaccard``: shared shingles divided by all distinct shingles of both documents; ``containment``: the
        share of the removed document's shingles that the kept document contains. Candidates are found by Jaccard
        similarity in both cases, so that a short excerpt of a long text is rarely found.
      hash: ``sha1`` gives signatures equal to those of datasketch with its default hash, but is much slower.
      max_bytes: number of bytes at the beginning of a text that enter the signature.
      max_bucket: buckets with more documents are reported as oversized.
      max_leaders: largest number of kept documents of a cluster with which a document is compared by signature.
      max_comparisons: largest number of these with which it is compared by exact similarity.
    """

    n_permutations: int = 112
    bands: int = 16
    shingle: int = 5
    seed: int = 1
    threshold: float = 0.75
    similarity: Literal["jaccard", "containment"] = "jaccard"
    hash: Literal["fast", "sha1"] = "fast"
    max_bytes: int = MAX_BYTES
    max_bucket: int = 10_000
    max_leaders: int = 64
    max_comparisons: int = 2

    def __post_init__(self):
        for name in ("n_permutations", "bands", "shingle", "max_bytes", "max_bucket", "max_leaders", "max_comparisons"):
            if getattr(self, name) < 1:
                raise ConfigError(f"minhash.{name} is {getattr(self, name)}; use at least 1")
        if self.n_permutations % self.bands:
            raise ConfigError(
                f"minhash.bands is {self.bands}, which does not divide minhash.n_permutations {self.n_permutations}; "
                f"use for example {self.n_permutations // self.bands * self.bands or self.bands} permutations"
            )
        if not 0 < self.threshold <= 1:
            raise ConfigError(f"minhash.threshold is {self.threshold}; use a similarity above 0 and up to 1")

    @property
    def rows(self) -> int:
        """Number of rows per band."""
        return self.n_permutations // self.bands


def document_hashes(texts: Sequence[bytes], config: MinHash) -> tuple[np.ndarray, np.ndarray]:
    """Hashes the shingles of texts as configured; see ``shingle_hashes`` for the result."""
    hasher = sha1_hashes if config.hash == "sha1" else shingle_hashes
    return hasher(texts, config.shingle, config.max_bytes)


@cache
def permutations(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors a (odd) and summands b of datasketch's scheme ``affine32``, each (n,) uint32."""
    from datasketch import MinHash as Datasketch

    a, b = Datasketch(num_perm=n, seed=seed, scheme="affine32").permutations
    return a, b


def signatures(hashes: np.ndarray, offsets: np.ndarray, config: MinHash, kernel: Kernel | None = None) -> np.ndarray:
    """Computes MinHash signatures.

    Args:
      hashes: (shingles,) uint32.
      offsets: (docs + 1,) int64; document i has ``hashes[offsets[i]:offsets[i + 1]]``.
      config: the number and the seed of the permutations.
      kernel: the computation; None: ``minima``. ``efftrain.ops.minhash.minima`` is the same computation in JAX.

    Returns:
      (docs, K) uint32: the minimum of ``a_k * fmix32(h) + b_k mod 2^32`` over the shingles h of each document;
      ``EMPTY`` in each column for a document without shingles.
    """
    filled = np.flatnonzero(np.diff(offsets))
    if not len(filled):
        return np.full((len(offsets) - 1, config.n_permutations), EMPTY)
    a, b = permutations(config.n_permutations, config.seed)
    rows = np.asarray((kernel or minima)(hashes, np.append(offsets[filled], offsets[-1]), a, b))
    if len(filled) == len(rows) == len(offsets) - 1:
        return rows
    result = np.full((len(offsets) - 1, config.n_permutations), EMPTY)
    result[filled] = rows
    return result


def minima(hashes: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The ``Kernel`` in NumPy. It works on blocks of shingles that fit into the cache; documents may span blocks."""
    result = np.full((len(offsets) - 1, len(a)), EMPTY)
    size = -(-len(hashes) // -(-len(hashes) // _BLOCK))  # blocks of equal size: a short last one would be slow
    buffer = np.empty((_PERMUTATIONS, size), np.uint32)
    for start in range(0, len(hashes), size):
        block = fmix32(hashes[start : start + size])
        first = np.searchsorted(offsets, start, side="right") - 1
        last = np.searchsorted(offsets, start + len(block))
        segments = np.maximum(offsets[first:last] - start, 0)
        for k in range(0, len(a), _PERMUTATIONS):
            columns = slice(k, k + _PERMUTATIONS)
            values = buffer[: len(a[columns]), : len(block)]
            np.multiply(a[columns, None], block, out=values)
            np.add(values, b[columns, None], out=values)
            out = result[first:last, columns]
            np.minimum(out, np.minimum.reduceat(values, segments, axis=1).T, out=out)
    return result


def fmix32(hashes: np.ndarray) -> np.ndarray:
    """Applies the finaliser of MurmurHash3 (Appleby), a bijection of uint32, as datasketch does before permuting."""
    mixed = hashes ^ (hashes >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def estimate(signatures: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimates the Jaccard similarity as the share of columns in which signatures (..., K) agree."""
    return np.mean(signatures == other, axis=-1)
