"""Counts of more things than an int32 holds, on the device: tokens, bytes, the weights of a model.

A count is three digits of 11 bits, (3,) int32 with the highest first: JAX has no int64 unless it is switched on for
the whole process.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

BITS = 11
_BASE = 1 << BITS
WEIGHTS = np.array([_BASE**2, _BASE, 1], np.float64)  # of the digits: ``digits @ WEIGHTS`` is the number, on the host


def as_count(n: Array | int) -> Array:
    """The count (3,) int32 of a number from 0 to 2^53: a Python integer, or a traced () float32 that is whole."""
    if isinstance(n, int):
        return jnp.array([n >> 2 * BITS, n >> BITS & _BASE - 1, n & _BASE - 1], jnp.int32)
    high = jnp.floor(n / _BASE**2)
    rest = n - high * _BASE**2  # exact, as the base is a power of two
    middle = jnp.floor(rest / _BASE)
    return jnp.stack([high, middle, rest - middle * _BASE]).astype(jnp.int32)


def total(numbers: Array) -> Array:
    """The sum, as a count, of an array of at most 2^20 numbers from 0 to 2^31 - 1, int32."""
    return carried([(numbers >> 2 * BITS).sum(), (numbers >> BITS & _BASE - 1).sum(), (numbers & _BASE - 1).sum()])


def carried(digits: Sequence[Array] | Array) -> Array:
    """A count of digits that may be too large, or negative where the whole is not: after sums and differences."""
    high, middle, low = digits
    middle += low >> BITS  # rounds down, so that a negative digit borrows
    high += middle >> BITS
    return jnp.stack([high, middle & _BASE - 1, low & _BASE - 1])


def at_least(a: Array, b: Array) -> Array:
    """() bool: whether a count is as large as another one."""
    later = (a[1] > b[1]) | ((a[1] == b[1]) & (a[2] >= b[2]))
    return (a[0] > b[0]) | ((a[0] == b[0]) & later)


def share_out(left: Array, wanted: Array) -> tuple[Array, Array]:
    """Gives each of ``wanted`` (n,) int32 what it asks for, first come, first served, as far as a count reaches.

    Returns:
      What is left, a count, and what each got, (n,) int32.
    """

    def give(left: Array, n: Array) -> tuple[Array, Array]:
        # Where it is not enough, what is left is less than an int32 holds.
        rest = (left[0] << 2 * BITS) + (left[1] << BITS) + left[2]
        taken = jnp.where(at_least(left, total(n[None])), n, rest)
        return carried(left - total(taken[None])), taken

    return jax.lax.scan(give, left, wanted)
