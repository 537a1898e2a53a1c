"""Sparse storage of arrays with many zeros, as one bit per number and the numbers that are not zero."""

from typing import Any

import jax
import numpy as np
from jax import Array

from efftrain.errors import RunError
from efftrain.ops.masks import count_zeros

BITS, VALUES = "#bits", "#values"  # suffixes of an array's name
WORTH = 0.95  # an array is stored sparsely if that takes at most this share of its bytes


def squeeze(flat: dict[str, Array]) -> dict[str, Array]:
    """Replaces each array that becomes smaller by its bits (uint8) and its nonzero values; inverse of ``expand``.

    Args:
      flat: arrays by name, all on this process.
    """
    found = {}
    for name, array in flat.items():
        values = np.asarray(array) if array.ndim >= 2 and not isinstance(array.dtype, jax.dtypes.extended) else None
        if values is None or not values.any() or sparse_bytes(array) > WORTH * values.nbytes:
            found[name] = array
            continue
        mask = values.view(f"u{values.itemsize}") != 0  # compares bits, because -0.0 counts as a value
        found[name + BITS] = jax.numpy.asarray(np.packbits(mask, axis=-1))
        found[name + VALUES] = jax.numpy.asarray(values[mask])
    return found


def stored_names(wanted: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Returns the arrays to read for ``wanted``, as shapes: bits and values (from ``saved``) where one was squeezed."""
    found = {}
    for name, like in wanted.items():
        if name in saved or name + BITS not in saved:
            found[name] = like
            continue
        # On one device, whatever mesh the whole array is for.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        for end, dtype in ((BITS, np.uint8), (VALUES, like.dtype)):
            found[name + end] = jax.ShapeDtypeStruct(tuple(saved[name + end].shape), dtype, sharding=here)
    return found


def expand(stored: dict[str, Array], wanted: dict[str, Any]) -> dict[str, Array]:
    """Rebuilds the arrays of ``wanted`` (shapes with shardings) from the arrays that ``stored_names`` named.

    Raises:
      RunError: an array was stored with another shape.
    """
    found = {}
    for name, like in wanted.items():
        if name in stored:
            found[name] = stored[name]
            continue
        bits, values = np.asarray(stored[name + BITS]), np.asarray(stored[name + VALUES])
        *leading, size = like.shape
        mask = np.unpackbits(bits, axis=-1, count=size).astype(bool) if bits.shape[-1] * 8 >= size else bits
        if bits.shape != (*leading, -(-size // 8)) or np.count_nonzero(mask) != len(values):
            raise RunError(f"{name} was stored with another shape than {like.shape}; it is of another model")
        dense = np.zeros(like.shape, values.dtype)
        dense[mask] = values
        found[name] = jax.numpy.asarray(dense) if like.sharding is None else jax.device_put(dense, like.sharding)
    return found


def sparse_bytes(array: Array) -> int:
    """Number of bytes that the bits and values of an array take."""
    bits = array.size // array.shape[-1] * -(-array.shape[-1] // 8)
    return bits + (array.size - count_zeros(array)) * array.dtype.itemsize
