"""Rotary position embedding in the half-split layout of Hugging Face, so that exporting weights is a transpose."""

import jax.numpy as jnp
from jax import Array


def rope_angles(positions_bt: Array, d_head: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of the rotation angles of every position.

    Args:
      positions_bt: (batch, length) integers.
      d_head: size of a head, even.
      theta: base of the frequencies.

    Returns:
      Two float32 arrays (batch, length, d_head / 2).

    Source: Su et al. 2021.
    """
    frequencies = theta ** (-jnp.arange(0, d_head, 2, dtype=jnp.float32) / d_head)
    angles = positions_bt[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_bthd: Array, cos_btr: Array, sin_btr: Array) -> Array:
    """Rotates the pair (x[i], x[i + d/2]) of each head by its angle; same shape and dtype as x."""
    first, second = jnp.split(x_bthd.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_btr[:, :, None], sin_btr[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_bthd.dtype)
