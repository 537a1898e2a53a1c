"""What the dense products of a layer are multiplied with, on calibration data, and the layer's output."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.attention import SelfAttention
from efftrain.models.linear import Linear
from efftrain.models.mlp import SwiGLU

ROWS = 8  # that a layer computes at once


@dataclass(frozen=True)
class Calibration:
    """Rows of text as a model reads them in training: (rows, length) int32 each."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def __post_init__(self):
        if self.tokens.ndim != 2 or not len(self.tokens) or not (self.segments > 0).any():
            raise ConfigError("the calibration text is shorter than one row; give a corpus with more text")

    def batches(self) -> list[slice]:
        return [slice(start, start + ROWS) for start in range(0, len(self.tokens), ROWS)]


class Gram(nnx.Variable):
    """Sums over tokens of products of inputs, (d_in, d_in) float32."""


class Observed(nnx.Module):
    """A ``Linear`` that adds up the products of its inputs."""

    def __init__(self, linear: Linear):
        d_in = linear.kernel.shape[-2]
        self.linear, self.gram = linear, Gram(jnp.zeros((d_in, d_in), jnp.float32))

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        self.gram[...] += jnp.matmul(flat.T, flat, precision="highest")
        return self.linear(x)


def forward(layer: nnx.Module, x_ntd: np.ndarray, calibration: Calibration) -> np.ndarray:
    """The layer's output (rows, length, d_model) for its input, some rows at a time."""
    graph, state = nnx.split(layer)
    out_ntd = np.empty_like(x_ntd)
    for rows in calibration.batches():
        out_ntd[rows] = _compute(graph, state, x_ntd[rows], calibration.positions[rows], calibration.segments[rows])
    return out_ntd


def grams(layer: nnx.Module, x_ntd: np.ndarray, calibration: Calibration) -> dict[str, Array]:
    """For each dense product of a plain block, by its path in it, the sum of ``x x^T`` over the calibration's tokens.

    Products that see the same input share one array.
    """
    graph, rest = nnx.split(layer)
    observed = nnx.merge(graph, rest, copy=True)  # the caller's stays as it is
    leader = _same_input(observed)
    for holder_path, holder in list(nnx.iter_modules(observed)):
        for name, linear in list(vars(holder).items()):
            if isinstance(linear, Linear) and (*holder_path, name) not in leader:
                setattr(holder, name, Observed(linear))
    graph, sums, rest = nnx.split(observed, Gram, ...)
    for rows in calibration.batches():
        sums = _add_products(graph, sums, rest, x_ntd[rows], calibration.positions[rows], calibration.segments[rows])
    found = {path[:-1]: variable[...] for path, variable in nnx.to_flat_state(sums)}
    found |= {path: found[first] for path, first in leader.items()}
    return {"/".join(map(str, path)): gram for path, gram in found.items()}


def _same_input(layer: nnx.Module) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Paths of products that see what another one sees, and the path of that one."""
    found = {}
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, SelfAttention):
            found |= {(*path, name): (*path, "query") for name in ("key", "value")}
        elif isinstance(module, SwiGLU):
            found[*path, "up"] = (*path, "gate")
    return found


@partial(jax.jit, static_argnums=0)
def _compute(graph: nnx.GraphDef, state: nnx.State, x_btd: Array, positions_bt: Array, segments_bt: Array) -> Array:
    return nnx.merge(graph, state)(x_btd, positions_bt, segments_bt)[0]


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add_products(graph, sums, rest, x_btd, positions_bt, segments_bt) -> nnx.State:
    layer = nnx.merge(graph, sums, rest)
    layer(x_btd, positions_bt, segments_bt)
    return nnx.state(layer, Gram)


def inputs_of(outer: nnx.Module, calibration: Calibration) -> np.ndarray:
    """What the first layer reads: embedded tokens (rows, length, d_model)."""
    return np.asarray(outer.embedding(jnp.asarray(calibration.tokens)))


def relative_error(change_df: Array, weight_df: Array, gram_dd: Array) -> float:
    """The root of the mean squared change of a product's output over that of the output."""

    def energy(a_df: Array) -> Array:
        return (jnp.matmul(gram_dd, a_df, precision="highest") * a_df).sum()

    return float(jnp.sqrt(energy(change_df) / jnp.maximum(energy(weight_df), 1e-30)))


Grams = Mapping[str, Array]
