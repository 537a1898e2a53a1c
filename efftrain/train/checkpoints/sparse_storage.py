"""Arrays with many zeros, stored as a bit for each number and the numbers that are not zero."""

from typing import Any

import jax
import numpy as np
from jax import Array

from efftrain.errors import RunError
from efftrain.ops.masks import count_zeros

BITS, VALUES = "#bits", "#values"  # behind an array's name
WORTH = 0.95  # of an array's bytes


def squeeze(flat: dict[str, Array]) -> dict[str, Array]:
    """Arrays by name; in place of each that takes fewer bytes so its bits (uint8) and values. Of one process.

    The inverse is ``expand``.
    """
    found = {}
    for name, array in flat.items():
        values = np.asarray(array) if array.ndim >= 2 and not isinstance(array.dtype, jax.dtypes.extended) else None
        if values is None or not values.any() or sparse_bytes(array) > WORTH * values.nbytes:
            found[name] = array
            continue
        mask = values.view(f"u{values.itemsize}") != 0  # the bits: -0.0 is a value
        found[name + BITS] = jax.numpy.asarray(np.packbits(mask, axis=-1))
        found[name + VALUES] = jax.numpy.asarray(values[mask])
    return found


def stored_names(wanted: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """What has to be read for ``wanted``, where some of it was squeezed: shapes from ``saved``."""
    found = {}
    for name, like in wanted.items():
        if name in saved or name + BITS not in saved:
            found[name] = like
            continue
        # On one device, whatever mesh the whole array goes to.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        for end, dtype in ((BITS, np.uint8), (VALUES, like.dtype)):
            found[name + end] = jax.ShapeDtypeStruct(tuple(saved[name + end].shape), dtype, sharding=here)
    return found


def expand(stored: dict[str, Array], wanted: dict[str, Any]) -> dict[str, Array]:
    """The arrays of ``wanted`` (shapes with shardings) from what ``stored_names`` said.

    Raises:
      RunError: an array has another shape than was stored.
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
    """Of bits and values of an array."""
    bits = array.size // array.shape[-1] * -(-array.shape[-1] // 8)
    return bits + (array.size - count_zeros(array)) * array.dtype.itemsize
