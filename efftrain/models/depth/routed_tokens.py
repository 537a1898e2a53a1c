"""Gathers the tokens that pass a routed layer from their rows, and scatters them back."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.models.depth.depth_router import ChosenTokens
from efftrain.sharding.rules import constrain, shard_count

TILE, MANY_TILES = 128, 8  # in a row of at least MANY_TILES tiles, a multiple of a tile passes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedTokens:
    """Tokens between routed layers; the valid ones of a row come first.

    Attributes:
      x_btd, positions_bt, segments_bt: as in ``Block``.
      valid_bt: bool, False for padding.
      ids_bt: (batch, tokens) token ids, for layers that read them. None: no layer does.
    """

    x_btd: Array
    positions_bt: Array
    segments_bt: Array
    valid_bt: Array
    ids_bt: Array | None = None


def gated(x_bnd: Array, y_bnd: Array, choice: ChosenTokens) -> Array:
    """Stream (batch, n, d_model) of the chosen tokens after a round, whose change is scaled by their gates."""
    return x_bnd + (y_bnd - x_bnd) * choice.gates_bn[..., None].astype(x_bnd.dtype)


def take(tokens: RoutedTokens, choice: ChosenTokens) -> RoutedTokens:
    """Gathers the chosen tokens of each row."""
    if tokens.x_btd.shape[1] == 1:  # decoding: a single token needs no gather
        return replace(tokens, valid_bt=choice.valid_bn)

    def pick(a_bt: Array) -> Array:
        return jnp.take_along_axis(a_bt, choice.indices_bn, axis=1)

    x_bnd = jax.vmap(lambda x, indices: x[indices])(tokens.x_btd, choice.indices_bn)
    # Invalid tokens are in a segment of their own, that of padding.
    return RoutedTokens(
        constrain(x_bnd, "batch", "length", None),
        pick(tokens.positions_bt),
        jnp.where(choice.valid_bn, pick(tokens.segments_bt), 0),
        choice.valid_bn,
        None if tokens.ids_bt is None else pick(tokens.ids_bt),
    )


def put(x_btd: Array, y_bnd: Array, choice: ChosenTokens) -> Array:
    """Replaces the valid chosen tokens in x (batch, length, ...)."""
    if x_btd.shape[1] == 1:
        return jnp.where(choice.valid_bn.reshape(-1, *[1] * (x_btd.ndim - 1)), y_bnd, x_btd)
    indices_bn = jnp.where(choice.valid_bn, choice.indices_bn, x_btd.shape[1])  # an index outside the row is dropped
    scatter = jax.vmap(lambda x, indices, y: x.at[indices].set(y, mode="drop"))
    return constrain(scatter(x_btd, indices_bn, y_bnd), "batch", "length", *[None] * (x_btd.ndim - 2))


def divisible(count: int, length: int) -> int:
    """Rounds a token count up so that the mesh can split it and kernels get whole tiles; at most ``length``."""
    step = shard_count("length") * (TILE if length >= MANY_TILES * TILE else 1)
    return min(length, -(-count // step) * step)
