"""Rotary position embedding in the half-split layout of Hugging Face, so that exporting weights is a transpose.

The frequencies of a model that was extended to longer texts are functions of the original ones, (r,) with r the number
of rotated pairs of channels.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def rope_frequencies(d_rotated: int, theta: float) -> Array:
    """Angles per position, (d_rotated / 2,) float32, for an even number of rotated channels. Source: Su et al. 2021."""
    return theta ** (-jnp.arange(0, d_rotated, 2, dtype=jnp.float32) / d_rotated)


def rope_angles(positions_bt: Array, frequencies_r: Array) -> tuple[Array, Array]:
    """Cosines and sines of the rotation angles of every position.

    Args:
      positions_bt: (batch, length) integers.
      frequencies_r: (r,) float32, see ``rope_frequencies``.

    Returns:
      Two float32 arrays (batch, length, r).
    """
    angles = positions_bt[..., None].astype(jnp.float32) * frequencies_r
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_bthd: Array, cos_btr: Array, sin_btr: Array) -> Array:
    """Rotates the pair (x[i], x[i + r]) of each head by its angle; the channels from 2 r on stay; shape and dtype of x.

    A model that rotates a part of a head is GPT-NeoX (Black et al. 2022, section 2.1).
    """
    n_rotated = 2 * cos_btr.shape[-1]
    turned, rest = (x_bthd, None) if n_rotated == x_bthd.shape[-1] else jnp.split(x_bthd, [n_rotated], axis=-1)
    first, second = jnp.split(turned.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_btr[:, :, None], sin_btr[:, :, None]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bthd.dtype)
    return rotated if rest is None else jnp.concatenate([rotated, rest], axis=-1)


def llama3_frequencies(
    frequencies_r: Array, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Array:
    """Divides low frequencies by ``factor``, keeps high ones, and interpolates between the two.

    A frequency is low if it turns fewer than ``low_freq_factor`` times in ``original_length`` positions, and high if
    more than ``high_freq_factor`` times.

    Source: Dubey et al. 2024 (Llama 3), whose code (llama-models, ``apply_scaling``) defines it.
    """
    turns_r = original_length * frequencies_r / (2 * math.pi)
    kept_r = jnp.clip((turns_r - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
    return _between(frequencies_r, factor, kept_r)


def yarn_frequencies(
    frequencies_r: Array,
    *,
    theta: float,
    factor: float,
    original_length: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Array:
    """Divides the frequencies that turn fewer than ``beta_slow`` times in the original length by ``factor``.

    Those that turn more than ``beta_fast`` times are kept, and between the two the share falls linearly with the index.

    Args:
      frequencies_r: (r,) the original frequencies.
      theta: their base.
      factor: how many times longer the texts are.
      original_length: length in tokens of the longest sequence before the extension.
      beta_fast, beta_slow: numbers of turns.
      truncate: round the bounds of the linear part outwards to whole indices.

    Source: Peng et al. 2023 (YaRN), section 3.2; truncation and bounds as in the authors' code.
    """
    n_rotated = 2 * len(frequencies_r)

    def index(turns: float) -> float:
        return n_rotated * math.log(original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(beta_fast), index(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, n_rotated - 1)
    span = high - low if high != low else 0.001
    return _between(frequencies_r, factor, 1 - jnp.clip((jnp.arange(len(frequencies_r)) - low) / span, 0, 1))


def yarn_attention_factor(factor: float, mscale: float = 1.0) -> float:
    """Factor of queries and keys for texts that are ``factor`` times longer. Peng et al. 2023 (YaRN), equation 22."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def long_rope_frequencies(frequencies_r: Array, factors_r: tuple[float, ...]) -> Array:
    """Divides each frequency by a factor of its own that a search has found. Source: Ding et al. 2024 (LongRoPE)."""
    return frequencies_r / np.asarray(factors_r, np.float32)


def long_rope_attention_factor(factor: float, original_length: int) -> float:
    """Factor of queries and keys for texts that are ``factor`` times longer. Ding et al. 2024 (LongRoPE), section 3."""
    return math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0


def _between(frequencies_r: Array, factor: float, kept_r: Array) -> Array:
    return frequencies_r * (kept_r + (1 - kept_r) / factor)
