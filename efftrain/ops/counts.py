"""Counts on the device that may exceed an int32: of tokens, of bytes, of the weights of a model.

A count has three digits of 11 bits, (3,) int32 with the highest digit first, because JAX has no int64 unless it is
switched on for the whole process.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BITS = 11
_BASE = 1 << BITS
WEIGHTS = np.array([_BASE**2, _BASE, 1], np.float64)  # of the digits: on the host, ``digits @ WEIGHTS`` is the number


def as_count(n: Array | int) -> Array:
    """Returns a number from 0 to 2^53 as a count (3,) int32; a Python integer, or a traced whole () float32."""
    if isinstance(n, int):
        return jnp.array([n >> 2 * BITS, n >> BITS & _BASE - 1, n & _BASE - 1], jnp.int32)
    high = jnp.floor(n / _BASE**2)
    rest = n - high * _BASE**2  # exact, because the base is a power of two
    middle = jnp.floor(rest / _BASE)
    return jnp.stack([high, middle, rest - middle * _BASE]).astype(jnp.int32)


def total(numbers: Array) -> Array:
    """Sums an array of at most 2^20 int32 numbers from 0 to 2^31 - 1; returns a count."""
    return carried([(numbers >> 2 * BITS).sum(), (numbers >> BITS & _BASE - 1).sum(), (numbers & _BASE - 1).sum()])


def carried(digits: Sequence[Array] | Array) -> Array:
    """Carries digits that are too large, or negative while the number is not, as after sums and differences."""
    high, middle, low = digits
    middle += low >> BITS  # rounds down, so that a negative digit borrows
    high += middle >> BITS
    return jnp.stack([high, middle & _BASE - 1, low & _BASE - 1])


def at_least(a: Array, b: Array) -> Array:
    """Returns () bool: whether the count a is at least the count b."""
    later = (a[1] > b[1]) | ((a[1] == b[1]) & (a[2] >= b[2]))
    return (a[0] > b[0]) | ((a[0] == b[0]) & later)


def allocate(left: Array, wanted: Array) -> tuple[Array, Array]:
    """Allocates a count to ``wanted`` (n,) int32, first come, first served, until nothing is left.

    Returns:
      The count that is left, and what each got, (n,) int32.
    """

    def give(left: Array, n: Array) -> tuple[Array, Array]:
        # If the count does not suffice, what is left fits into an int32.
        rest = (left[0] << 2 * BITS) + (left[1] << BITS) + left[2]
        taken = jnp.where(at_least(left, total(n[None])), n, rest)
        return carried(left - total(taken[None])), taken

    return jax.lax.scan(give, left, wanted)
