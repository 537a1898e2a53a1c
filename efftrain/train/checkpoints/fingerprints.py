"""Fingerprints of arrays: a few bits that identify the content of an array, on whatever mesh it is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.sharding.rules import without_mesh

SPAN = 2**18  # numbers of a block whose bits are summed at once


def fingerprints(flat: dict[str, Any]) -> dict[str, int]:
    """Returns a 32-bit fingerprint of each array, which is the same on every mesh."""
    found = {}
    with without_mesh():  # a model read onto one device during a run is on none of the run's mesh devices
        for name, array in flat.items():
            found[name] = _fingerprint(array)
            if _on_several_cpus(array):  # many all-reduces in flight deadlock fake devices on CPU
                found[name].block_until_ready()
    return {name: int(value) for name, value in jax.device_get(found).items()}


class BlockFingerprint:
    """The fingerprint of an array of which one block after the other is seen, in the order of the array."""

    def __init__(self) -> None:
        self.value = 0
        self._place = 0

    def add(self, block: np.ndarray) -> None:
        """Adds the next block, on the host."""
        bits = np.ascontiguousarray(block).reshape(-1).view(f"u{block.itemsize}")
        for start in range(0, bits.size, SPAN):
            span = bits[start : start + SPAN].astype(np.uint32)
            place = np.arange(self._place, self._place + span.size, dtype=np.uint64).astype(np.uint32)
            self.value = (self.value + int(np.sum(span * (2 * place + 1), dtype=np.uint32))) % 2**32
            self._place += span.size


def _on_several_cpus(array: Any) -> bool:
    devices = array.sharding.device_set if isinstance(array, Array) else ()
    return len(devices) > 1 and next(iter(devices)).platform == "cpu"


@jax.jit
def _fingerprint(x: Array) -> Array:
    """The sum modulo 2^32 of all elements' bits, each times an odd number that depends on its index.

    An odd factor is invertible, so that every change of a single element is noticed. An integer sum does not depend on
    its order, so that the sharding has no influence.
    """
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
