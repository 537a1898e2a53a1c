"""The check of a saved model for numbers that are not finite, made where a model is read, before it is used."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.errors import RunError

BLOCKS = "blocks/"


def check_finite(array: Array | np.ndarray, name: str, names: Iterable[str], source: object, *, first: int = 0) -> None:
    """Raises an error if an array of a model has a number that is not finite.

    Args:
      array: any dtype and sharding; arrays of blocks are stacked, with the layers as the first axis.
      name: name of the array, such as ``blocks/0/mlp/up/kernel``, where 0 is the position in the pattern.
      names: names of all arrays of the model.
      source: where the model was read from, for the error message.
      first: of blocks, the place in the stack of the first layer in ``array``.

    Raises:
      RunError: the message names the array and, in a block, the layer.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact) or _is_finite(array):
        return
    if name.startswith(BLOCKS):
        position, _, inner = name.removeprefix(BLOCKS).partition("/")
        n_positions = len({other.split("/")[1] for other in names if other.startswith(BLOCKS)})
        repeat = next(i for i in range(len(array)) if not _is_finite(array[i]))
        name = f"{inner} of layer {(first + repeat) * n_positions + int(position)}"
    raise RunError(
        f"{source}: {name} holds numbers that are not finite (NaN or infinity), so that this model cannot be "
        "used; take an earlier checkpoint, or train the model again"
    )


@jax.jit
def _finite(x: Array) -> Array:
    return jnp.isfinite(x).all()


def _is_finite(x: Array | np.ndarray) -> bool:
    return bool(np.isfinite(x).all() if isinstance(x, np.ndarray) else _finite(x))
