"""Normalisations of the last axis."""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """``x / rms(x) * scale`` over the last axis, computed in float32, returned in x's dtype.

    Args:
      x: (..., d), any float dtype.
      scale: (d,).
      eps: added to the mean square.

    Source: Zhang and Sennrich 2019.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """``(x - mean(x)) / std(x) * scale + bias`` over the last axis, computed in float32, returned in x's dtype.

    Args:
      x: (..., d), any float dtype.
      scale: (d,).
      bias: (d,). None: no bias.
      eps: added to the variance.

    Source: Ba et al. 2016.
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    y = centred * inverse * scale
    return (y if bias is None else y + bias).astype(x.dtype)
