"""The permutations of MinHash in JAX: an alternative to ``efftrain.data.dedup.minhash.minima``.

On CPU NumPy is faster; with an accelerator, hashing the shingles on the host takes most of the time.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def minima(hashes: np.ndarray, offsets: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Minimum of ``a_k * fmix32(h) + b_k mod 2^32`` over the hashes of each document, for each permutation k.

    Args:
      hashes: (m,) uint32, the hashes of all documents.
      offsets: (docs + 1,) int64, strictly rising from 0 to m; document i has ``hashes[offsets[i]:offsets[i + 1]]``.
      a: (K,) uint32, odd.
      b: (K,) uint32.

    Returns:
      (docs, K) uint32, on the host.
    """
    n_documents = len(offsets) - 1
    # Padded to powers of two, so that few shapes are compiled. Padding is one more document, which is dropped.
    n_hashes, n_segments = (1 << int(size).bit_length() for size in (len(hashes), n_documents))
    segments = np.repeat(np.arange(n_documents, dtype=np.int32), np.diff(offsets))
    segments = np.pad(segments, (0, n_hashes - len(hashes)), constant_values=n_documents)
    hashes = np.pad(hashes, (0, n_hashes - len(hashes)))
    return np.asarray(_segment_minima(hashes, segments, a, b, n_segments))[:, :n_documents].T


@partial(jax.jit, static_argnames="n_segments")
def _segment_minima(hashes: Array, segments: Array, a: Array, b: Array, n_segments: int) -> Array:
    mixed = fmix32(hashes)

    def one(factors):
        return jax.ops.segment_min(factors[0] * mixed + factors[1], segments, n_segments, indices_are_sorted=True)

    return jax.lax.map(one, (a, b), batch_size=8)  # all permutations at once would need memory for m x K numbers


def fmix32(hashes: Array) -> Array:
    """The finaliser of MurmurHash3 (Appleby), a bijection of uint32."""
    mixed = hashes ^ (hashes >> 16)
    mixed = mixed * jnp.uint32(0x85EBCA6B)
    mixed = mixed ^ (mixed >> 13)
    mixed = mixed * jnp.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)
