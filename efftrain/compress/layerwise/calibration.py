"""Calibration: statistics of what the layers of a model read on calibration text; padding is never counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.attention import SelfAttention
from efftrain.models.block import Block
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Linear
from efftrain.models.mlp import FeedForward
from efftrain.models.moe.layer import RoutedExperts

ROWS = 8  # number of rows that a layer computes at once
NORM_LIMIT = 3.0
SAMPLE = 256  # number of tokens for which errors of outputs are compared one by one


@dataclass(frozen=True)
class CalibrationSize:
    """The amount of text that statistics were computed from.

    Attributes:
      rows: number of rows with at least one token.
      rows_asked: number of rows that were asked for; None if unknown.
      tokens: number of tokens without padding.
    """

    rows: int
    rows_asked: int | None
    tokens: int


@dataclass(frozen=True)
class CalibrationRows:
    """Rows of text as a model reads them in training.

    Attributes:
      tokens, segments, positions: (rows, length) int32; see ``data.storage.packing.row``. Segment 0 is padding.
      rows_asked: number of rows that were asked for, for reports. None: unknown.
      norm_limit: limit of the norm of a product's input, as a multiple of the median over the tokens of a batch. Larger
        inputs are scaled down to it before they enter a statistic: a few tokens of massive activations, mostly at the
        start of a segment (Sun et al. 2024, Massive Activations), would otherwise decide it alone. None: no limit.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    rows_asked: int | None = None
    norm_limit: float | None = NORM_LIMIT

    def __post_init__(self):
        if self.tokens.ndim != 2 or not len(self.tokens) or not (self.segments > 0).any():
            raise ConfigError("the calibration text is shorter than one row; give a corpus with more text")

    def batches(self) -> list[slice]:
        return [slice(start, start + ROWS) for start in range(0, len(self.tokens), ROWS)]

    @property
    def size(self) -> CalibrationSize:
        """The amount of this text."""
        valid = np.asarray(self.segments) > 0
        return CalibrationSize(int(valid.any(1).sum()), self.rows_asked, int(valid.sum()))


class Tap:
    """Replaces a module that maps each token, and records its input and output, with zeros at padding.

    The modules after it read these zeros too, so that padding adds nothing to the statistics of experts.

    Args:
      holder: the module that has the replaced module as an attribute.
      name: name of that attribute.
      valid_bt: bool (batch, length), False at padding.
    """

    def __init__(self, holder: nnx.Module, name: str, valid_bt: Array):
        self.module, self.valid_bt1 = getattr(holder, name), valid_bt[..., None]
        setattr(holder, name, self)

    def __call__(self, x_btd: Array) -> Array:
        self.read_btd = jnp.where(self.valid_bt1, x_btd, 0)
        self.given_btd = jnp.where(self.valid_bt1, self.module(x_btd), 0)
        return self.given_btd


class _Product:
    """Replaces a ``Linear`` and adds up a statistic of its inputs, without padding."""

    def __init__(
        self,
        linear: Linear,
        path: str,
        statistic: Callable[[Array], Array],
        valid_bt: Array,
        norm_limit: float | None,
    ):
        self.linear, self.path, self.statistic, self.valid_bt = linear, path, statistic, valid_bt
        self.norm_limit, self.total = norm_limit, jnp.zeros(())

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        valid_n = self.valid_bt.reshape(-1)
        if len(flat) != len(valid_n):
            raise ConfigError(
                f"{self.path} reads {len(flat)} vectors for {len(valid_n)} tokens, so that padding cannot be left out; "
                "use a method that reads no calibration text (rtn, magnitude)"
            )
        flat = jnp.where(valid_n[:, None], flat, 0)
        self.total += self.statistic(flat * limiting_factor(flat, self.norm_limit))
        return self.linear(x)


def limiting_factor(x_nd: Array, limit: float | None) -> Array:
    """The factor by which each vector is scaled down to a norm of at most ``limit`` times the median of the norms.

    Args:
      x_nd: (n, d) float32; vectors of zeros do not count.
      limit: a multiple of the median. None: no limit.

    Returns:
      (n, 1) float32, at most 1.
    """
    if limit is None:
        return jnp.ones((len(x_nd), 1))
    norm_n1 = jnp.linalg.norm(x_nd, axis=-1, keepdims=True)
    most = limit * jnp.nanmedian(jnp.where(norm_n1 > 0, norm_n1, jnp.nan))
    return jnp.where(norm_n1 > most, most / norm_n1, 1)


def forward(layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> np.ndarray:
    """Computes a layer's output (rows, length, d_model) for its input of that shape, a few rows at a time."""
    graph, state = nnx.split(layer)
    out_ntd = np.empty_like(x_ntd)
    for rows in calibration.batches():
        out_ntd[rows] = _compute(graph, state, x_ntd[rows], calibration.positions[rows], calibration.segments[rows])
    return out_ntd


def hessians(layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> dict[str, Array]:
    """Sums ``x x^T`` over the calibration tokens for the input x of each dense product of a plain block.

    Products that read the same input share one array. Norms of inputs are limited; see ``CalibrationRows``.

    Args:
      layer: the block; not changed.
      x_ntd: input of the block, (rows, length, d_model).
      calibration: the rows that ``x_ntd`` was computed from; their padding is left out.

    Returns:
      (d_in, d_in) float32 for each product, by its path in the block.
    """
    return _input_sums(_hessian, layer, x_ntd, calibration)


def magnitudes(layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> dict[str, Array]:
    """Sums ``|x|`` over the calibration tokens for each product, (d_in,) float32; otherwise as ``hessians``."""
    return _input_sums(_magnitude, layer, x_ntd, calibration)


def input_samples(layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> dict[str, Array]:
    """Returns ``SAMPLE`` inputs of each product, (SAMPLE, d_in) float32, spread over the first rows, as they are.

    Rows of zeros stand for padding. Otherwise as ``hessians``.
    """
    rows = calibration.batches()[0]
    first = replace(
        calibration,
        tokens=calibration.tokens[rows],
        segments=calibration.segments[rows],
        positions=calibration.positions[rows],
        norm_limit=None,
    )
    return _input_sums(_spread, layer, x_ntd[rows], first)


def idle_experts(layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> tuple[int, ...]:
    """Indices of the experts of a plain block that no calibration token reached; arguments as of ``hessians``."""
    if not isinstance(layer, Block) or not isinstance(layer.mlp, RoutedExperts):
        return ()
    (graph, state), total_e = nnx.split(layer), np.zeros(())
    for rows in calibration.batches():
        found_e = _saliency(graph, state, x_ntd[rows], calibration.positions[rows], calibration.segments[rows])
        total_e = total_e + np.asarray(found_e, np.float64)
    return idle(total_e)


def unreached(numbers: tuple[int, ...]) -> str:
    """The end of a report's sentence that names the experts that no token reached; empty if there are none."""
    return f"; no token of the calibration reached the experts {', '.join(map(str, numbers))}" if numbers else ""


def idle(saliency_e: np.ndarray) -> tuple[int, ...]:
    """Indices of the experts whose sum of gate x output norm is zero."""
    return tuple(np.flatnonzero(np.asarray(saliency_e) == 0).tolist())


def keep_saliency(experts: RoutedExperts) -> None:
    """Makes a layer of experts add the sum of gate x output norm to its statistics; see ``MoE.saliency``."""
    config = experts.config
    dispatch = "auto" if config.dispatch == "reference" else config.dispatch  # "reference" computes no saliency
    experts.config = replace(config, saliency=True, dispatch=dispatch)


def _hessian(x_nd: Array) -> Array:
    return jnp.matmul(x_nd.T, x_nd, precision="highest")


def _magnitude(x_nd: Array) -> Array:
    return jnp.abs(x_nd).sum(0)


def _spread(x_nd: Array) -> Array:
    return x_nd[jnp.linspace(0, len(x_nd) - 1, SAMPLE).astype(jnp.int32)]


def _input_sums(
    statistic: Callable[[Array], Array], layer: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows
) -> dict[str, Array]:
    graph, state = nnx.split(layer)
    leader = _same_input(layer)
    sums = {}
    for path, linear in nnx.iter_modules(layer):
        if isinstance(linear, Linear) and path not in leader:
            shape = jax.eval_shape(statistic, jax.ShapeDtypeStruct((1, linear.kernel.shape[-2]), jnp.float32)).shape
            sums[_name(path)] = jnp.zeros(shape, jnp.float32)
    for rows in calibration.batches():
        where = calibration.positions[rows], calibration.segments[rows]
        sums = _add_inputs(graph, statistic, calibration.norm_limit, sums, state, x_ntd[rows], *where)
    return sums | {_name(path): sums[_name(first)] for path, first in leader.items()}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _same_input(layer: nnx.Module) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Maps the path of a product to the path of another product that reads the same input."""
    found = {}
    for path, module in nnx.iter_modules(layer):
        if isinstance(module, SelfAttention):
            found |= {(*path, name): (*path, "query") for name in ("key", "value")}
        elif isinstance(module, FeedForward) and module.gated:
            found[*path, "up"] = (*path, "gate")
    return found


@partial(jax.jit, static_argnums=0)
def _compute(graph: nnx.GraphDef, state: nnx.State, x_btd: Array, positions_bt: Array, segments_bt: Array) -> Array:
    return nnx.merge(graph, state)(x_btd, positions_bt, segments_bt)[0]


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _add_inputs(graph, statistic, norm_limit, sums, state, x_btd, positions_bt, segments_bt) -> dict[str, Array]:
    layer, valid_bt = nnx.merge(graph, state), segments_bt > 0
    products = []
    for holder_path, holder in list(nnx.iter_modules(layer)):
        for name, linear in list(vars(holder).items()):
            path = _name((*holder_path, name))
            if isinstance(linear, Linear) and path in sums:
                products.append(_Product(linear, path, statistic, valid_bt, norm_limit))
                setattr(holder, name, products[-1])
    layer(x_btd, positions_bt, segments_bt)
    return {product.path: sums[product.path] + product.total for product in products}


@partial(jax.jit, static_argnums=0)
def _saliency(graph, state, x_btd, positions_bt, segments_bt) -> Array:
    layer = nnx.merge(graph, state)
    if "mlp_norm" in layer.norms:
        Tap(layer, "mlp_norm", segments_bt > 0)
    keep_saliency(layer.mlp)
    return layer(x_btd, positions_bt, segments_bt)[1]["statistics"]["saliency"]


def inputs_of(outer: Decoder, calibration: CalibrationRows) -> np.ndarray:
    """The input of the first layer: the embedded tokens (rows, length, d_model)."""
    return np.asarray(outer.embed(*map(jnp.asarray, (calibration.tokens, calibration.positions))))


@dataclass(frozen=True)
class MatrixErrors:
    """How much a conversion changed a matrix and its outputs.

    Attributes:
      weights: root mean square of the change of the weights over that of the weights.
      outputs: the same for the outputs on the calibration text, with the limit of ``CalibrationRows.norm_limit``. None:
        the inputs were not observed.
      tokens: root mean square over tokens of the norm of an output's change over that of the output, so that each token
        counts the same. None: the inputs were not observed.
    """

    weights: float
    outputs: float | None = None
    tokens: float | None = None


def matrix_errors(
    after: Array, before: Array, hessian_dd: Array | None, sample_nd: Array | None = None
) -> MatrixErrors:
    """Compares a matrix (..., d, f) after and before a conversion.

    Args:
      after: the changed matrix.
      before: the matrix before the change.
      hessian_dd: ``hessians`` of its inputs. None: they were not observed.
      sample_nd: ``input_samples`` of its inputs.
    """
    found = _matrix_errors(after, before, hessian_dd, sample_nd)
    return MatrixErrors(*(None if error is None else float(error) for error in found))  # ty: ignore[invalid-argument-type]


@jax.jit
def _matrix_errors(after, before, hessian_dd, sample_nd) -> tuple[Array, Array | None, Array | None]:
    def ratio(change: Array, whole: Array) -> Array:
        return jnp.sqrt(change / jnp.maximum(whole, 1e-30))

    change, outputs, tokens = after - before, None, None
    weights = ratio(jnp.square(change).sum(), jnp.square(before).sum())
    if hessian_dd is not None:
        energies = [(jnp.matmul(hessian_dd, a_df, precision="highest") * a_df).sum() for a_df in (change, before)]
        outputs = ratio(*energies)
    if sample_nd is not None:
        change_n, output_n = (
            jnp.square(jnp.matmul(sample_nd, a_df, precision="highest")).sum(-1) for a_df in (change, before)
        )
        tokens = jnp.sqrt(jnp.nanmean(jnp.where(output_n > 0, change_n / jnp.maximum(output_n, 1e-30), jnp.nan)))
    return weights, outputs, tokens


Hessians = Mapping[str, Array]
