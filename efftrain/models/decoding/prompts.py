"""Pads prompts of several lengths to one array."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.errors import ConfigError

Prompts = Array | np.ndarray | Sequence[Sequence[int]]


def padded(prompts: Prompts, lengths_b: Array | np.ndarray | None) -> tuple[Array, Array]:
    """Returns prompts as an array (batch, longest) int32, padded on the right, and their lengths (batch,).

    Args:
      prompts: one list of token ids per row; or an array (batch, longest), padded with any token.
      lengths_b: lengths of the prompts in an array. None: all of them fill it. Not for lists, which have their own.

    Raises:
      ConfigError: there is no prompt, a prompt is empty, or lists come with lengths.
    """
    if not isinstance(prompts, Sequence):
        batch, longest = prompts.shape
        lengths_b = jnp.full(batch, longest, jnp.int32) if lengths_b is None else lengths_b
        return jnp.asarray(prompts), jnp.asarray(lengths_b)
    if lengths_b is not None:
        raise ConfigError("prompts are lists, which have their own lengths; remove prompt_lengths_b")
    sizes = [len(prompt) for prompt in prompts]
    if not all(sizes) or not sizes:
        raise ConfigError(f"the prompts have {sizes} tokens; give at least one prompt, and each at least one token")
    rows = np.zeros((len(sizes), max(sizes)), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(rows), jnp.asarray(sizes, jnp.int32)
