"""The highest numbers of several arrays together, which may be more than an int32 can count."""

import operator
from collections.abc import Sequence
from functools import reduce

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.counts import allocate, at_least, carried, total


def keep_highest_together(scores: Sequence[Array], n_keep: Array) -> list[Array]:
    """Marks the ``n_keep`` highest numbers of all arrays: bool like each array; of equal numbers, the first are kept.

    The lowest kept number is found bit by bit, by counting: nothing is sorted, and the arrays are not concatenated.

    Args:
      scores: (..., n) float each, without NaN; n below 2^31.
      n_keep: a count of ``ops.counts``; may be traced. Exactly this number is kept.
    """
    keys = [_ordered(a) for a in scores]

    def n_of(found: Sequence[Array]) -> Array:
        return carried(reduce(operator.add, (total(mask.sum(-1, dtype=jnp.int32)) for mask in found)))

    def with_bit(i: Array, least: Array) -> Array:
        higher = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(at_least(n_of([key >= higher for key in keys]), n_keep), higher, least)

    least = jax.lax.fori_loop(0, 32, with_bit, jnp.uint32(0))
    left, keep = carried(n_keep - n_of([key > least for key in keys])), []
    for key in keys:
        level = key == least
        left, taken = allocate(left, level.sum(-1, dtype=jnp.int32).reshape(-1))
        first = jnp.cumsum(level, -1, dtype=jnp.int32) <= taken.reshape(*key.shape[:-1], 1)
        keep.append((key > least) | (level & first))
    return keep


def _ordered(a: Array) -> Array:
    """Maps float32 numbers to uint32 in the same order; both zeros become one."""
    bits = jax.lax.bitcast_convert_type(jnp.where(a == 0, 0, a).astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)
