"""Unrolls a model into single layers for decoding, because a loop that takes stacked layers apart copies them."""

from functools import partial

import jax
from flax import nnx
from jax import Array

from efftrain.models.decoder import Decoder


def unrolled(model: Decoder, *, donate: bool = False) -> Decoder:
    """Returns a model that computes the same from the same parameters, with all layers in the pattern and one repeat.

    A program that decodes with it reads the layers in place; one that gets stacked layers holds them twice.

    Args:
      model: returned unchanged if nothing is stacked.
      donate: free each stacked array once it is taken apart, so that only one array at a time is held twice; ``model``
        cannot be used afterwards. False: both models hold their layers.
    """
    n = model.config.n_repeats
    if n == 1:
        return model
    copy = nnx.merge(*nnx.split(model))
    split = [nnx.split(stack) for stack in model.blocks]
    apart = [_apart(state, n, donate) for _, state in split]
    copy.blocks = nnx.List(
        nnx.merge(layer_def, layers[i]) for i in range(n) for (layer_def, _), layers in zip(split, apart, strict=True)
    )
    copy.config = model.config.replace(pattern=model.config.layers, n_repeats=1)
    return copy


def _apart(state: nnx.State, n: int, donate: bool) -> list[nnx.State]:
    """Returns n states with one layer each on the leading axis."""

    def one_layer(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(units=(1, *variable.get_metadata()["units"][1:]))

    leaves, tree = jax.tree.flatten(jax.tree.map(one_layer, state, is_leaf=lambda a: isinstance(a, nnx.Variable)))
    pieces = []
    for leaf in leaves:
        pieces.append(_split(leaf, n))
        if donate:
            leaf.delete()
    return [jax.tree.unflatten(tree, layer) for layer in zip(*pieces, strict=True)]


@partial(jax.jit, static_argnums=1)
def _split(stacked: Array, n: int) -> list[Array]:
    return list(jax.lax.split(stacked, [1] * n, axis=0))
