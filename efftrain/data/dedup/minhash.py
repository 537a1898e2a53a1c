"""MinHash signatures of many texts at once, equal bit for bit to those of datasketch.

    hashes, offsets = document_hashes(texts, config)
    rows = signatures(hashes, offsets, config)

Two texts agree in a share of the rows' columns that estimates the Jaccard similarity of their shingles, with standard
deviation ``sqrt(J (1 - J) / K)``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from efftrain.data.dedup.shingles import MAX_BYTES, sha1_hashes, shingle_hashes
from efftrain.errors import ConfigError

EMPTY = np.uint32(0xFFFFFFFF)
"""Every value in the signature of a document without a shingle, as in datasketch. Such documents match nothing."""

_BLOCK, _PERMUTATIONS = 18_000, 8  # a buffer of 576 kB: half of a usual second-level cache

Kernel = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(hashes (m,) uint32, offsets (docs + 1,) int64 strictly rising, a (K,), b (K,) uint32) -> (docs, K) uint32."""


@dataclass(frozen=True, kw_only=True)
class MinHash:
    """How near duplicates are found and what counts as one.

    The default is 16 bands of 7 rows. A pair of similarity s becomes a candidate with probability
    ``1 - (1 - s^7)^16``: .12 at 0.5, .36 at 0.6, .75 at 0.7, .90 at 0.75, .98 at 0.8, .998 at 0.85. FineWeb's 14 x 8
    on the same 112 permutations finds .77 at 0.75, and nobody gets the rest back; a candidate too many costs one exact
    comparison.

    Numbers are words like any other. Texts that differ in their numbers only (invoices, logs, tables, exercises) are
    different texts, and stay where the numbers are dense enough to break most shingles; datatrove, which masks
    numbers, removes them.

    A text of fewer words than ``shingle`` is one shingle and repeats another one only if all its words are the same. In
    a text a few times as long, one changed word changes ``shingle`` shingles and so most of them: such texts stay.

    Attributes:
      n_permutations: length of a signature; ``bands`` must divide it.
      bands: two documents are compared where all rows of one band agree.
      shingle: words per shingle.
      seed: of the permutations.
      threshold: exact similarity from which a document is removed.
      similarity: ``jaccard``: shared shingles of all; ``containment``: the removed document's shingles that the
        survivor has. Candidates are found by Jaccard similarity in either case, so that a short excerpt of a long
        text is seldom seen.
      hash: ``sha1`` gives signatures equal to datasketch's defaults, at a tenth of the speed.
      max_bytes: of a longer text only the start enters the signature.
      max_bucket: buckets with more documents are reported.
      max_leaders: survivors in a cluster that a document is compared with, by signature.
      max_comparisons: of those, how many by exact similarity.
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
        """Rows of one band."""
        return self.n_permutations // self.bands


def document_hashes(texts: Sequence[bytes], config: MinHash) -> tuple[np.ndarray, np.ndarray]:
    """The shingle hashes that the configuration asks for; see ``shingle_hashes``."""
    hasher = sha1_hashes if config.hash == "sha1" else shingle_hashes
    return hasher(texts, config.shingle, config.max_bytes)


@cache
def permutations(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors a (odd) and summands b of datasketch's scheme ``affine32``, each (n,) uint32."""
    from datasketch import MinHash as Datasketch

    a, b = Datasketch(num_perm=n, seed=seed, scheme="affine32").permutations
    return a, b


def signatures(hashes: np.ndarray, offsets: np.ndarray, config: MinHash, kernel: Kernel | None = None) -> np.ndarray:
    """MinHash signatures.

    Args:
      hashes: (shingles,) uint32.
      offsets: (docs + 1,) int64; document i has ``hashes[offsets[i]:offsets[i + 1]]``.
      kernel: the computation; by default ``minima``. ``efftrain.ops.minhash.minima`` is the same in JAX.

    Returns:
      (docs, K) uint32: over the document's shingles h the minimum of ``a_k * fmix32(h) + b_k mod 2^32``;
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
    """The ``Kernel`` in NumPy. Blocks of shingles stay in the cache; long documents go over several blocks."""
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
    """The finaliser of MurmurHash3 (Appleby), a bijection of uint32; datasketch applies it before the permutations."""
    mixed = hashes ^ (hashes >> np.uint32(16))
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def estimate(signatures: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of columns in which signatures (..., K) agree: an estimate of the Jaccard similarity."""
    return np.mean(signatures == other, axis=-1)
