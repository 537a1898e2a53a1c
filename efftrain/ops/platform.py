"""The platform for which a program is traced."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def platform() -> str:
    """ "cpu", "gpu" or "tpu", of the current mesh's devices, attached or not; without a mesh, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device  # ty: ignore[missing-attribute]  # an option, added at run time
    return getattr(device, "platform", device) or jax.default_backend()


def conditional(wanted: Array, compute: Callable[..., Any], skip: Callable[..., Any], *operands: Any) -> Any:
    """``lax.cond``, which computes one branch; on a mesh of several CPU devices it computes both and selects.

    Collectives of CPU devices share a few threads, and collectives within a condition may wait for each other for ever.
    """
    if platform() != "cpu" or jax.sharding.get_abstract_mesh().size <= 1:
        return jax.lax.cond(wanted, compute, skip, *operands)
    return jax.tree.map(partial(jnp.where, wanted), compute(*operands), skip(*operands))
