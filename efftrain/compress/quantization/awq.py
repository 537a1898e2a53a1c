"""AWQ: scales up the weights of important input channels before rounding, and clips large weights where that helps.

The row of a weight matrix for input channel j is multiplied by f_j, and the operation that produces the channel is
divided by f_j; only the rounding errors change. Source: Lin et al. 2024 (AWQ), section 3.2. The outputs whose errors
are compared, and the search for clips, follow the authors' llm-awq.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.compress.layerwise.calibration import CalibrationRows, Hessians, Tap, limiting_factor, magnitudes
from efftrain.models.attention import SelfAttention
from efftrain.models.block import Block
from efftrain.models.linear import CentredNorm, RMSNorm
from efftrain.models.mlp import FeedForward
from efftrain.models.quantization import in_float, rule_of
from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import (
    fake_quantize,
)

POWERS = 20  # number of exponents that are tried, from 0 to below 1, for the mean magnitudes of the inputs
SMALLEST_FACTOR = 1e-4


@dataclass(frozen=True)
class Shared:
    """Products that read the same input, which can therefore only be scaled together.

    Attributes:
      source: path, in the block, of the norm or product that produces the input; its output is divided by the factors.
      products: paths of the products in the block.
      part: the part of the block whose output error decides between factors. None: the error of the output of the
        product, which is then the only one.
    """

    source: str
    products: tuple[str, ...]
    part: Literal["attention", "mlp"] | None = None


def shared_inputs(block: Block) -> list[Shared]:
    """The inputs that can be scaled in a plain block, in the order in which they must be scaled.

    The input of a part can be scaled if no other part reads the norm before it.
    """
    found, norms = [], {name: getattr(block, name) for name in block.norms}
    own = {name for name, norm in norms.items() if isinstance(norm, RMSNorm | CentredNorm)}
    if "mlp_norm" not in norms:  # both parts read the same norm, or none
        own.clear()
    if isinstance(block.attention, SelfAttention):
        names = ("attention/query", "attention/key", "attention/value")
        if "attention_norm" in own:
            found.append(Shared("attention_norm", names, "attention"))
        config = block.attention.config
        if config.n_heads == config.n_kv_heads:  # otherwise several heads read the same value
            found.append(Shared("attention/value", ("attention/out",)))
    if isinstance(block.mlp, FeedForward):
        gated = block.mlp.gated
        if gated:  # otherwise the activation is between the two products
            found.append(Shared("mlp/up", ("mlp/down",)))
        if "mlp_norm" in own:
            found.append(Shared("mlp_norm", ("mlp/gate", "mlp/up") if gated else ("mlp/up",), "mlp"))
    # Products as sources come first: "value" and "up" must be divided before their own inputs are scaled and rounded.
    return sorted(found, key=lambda shared: shared.source.endswith("norm"))


def scale_inputs(block: Block, x_ntd: np.ndarray, calibration: CalibrationRows, hessians: Hessians) -> dict[str, Array]:
    """Scales the inputs of a plain block's products in place; products whose steps were learned are not scaled.

    Args:
      block: its matrices are float and have their quantisation rules.
      x_ntd: input of the block on the calibration text, (rows, length, d_model).
      calibration: the rows that ``x_ntd`` was computed from.
      hessians: ``calibration.hessians`` of the block on this input.

    Returns:
      The factors (d_in,) of each product that was scaled, by its path in the block.
    """
    factors: dict[str, Array] = {}
    sums = magnitudes(block, x_ntd, calibration)
    for shared in shared_inputs(block):
        kernels = [_find(block, f"{name}/kernel") for name in shared.products]
        rules = [rule for kernel in kernels if (rule := rule_of(kernel)) is not None and not rule.learned_step]
        formats = tuple(rule.weights for rule in rules if rule.weights is not None)
        if len(formats) < len(kernels):
            continue
        tried_pd = tried_factors(sums[shared.products[0]] / calibration.size.tokens)
        if shared.part is None:
            errors_p = product_errors(kernels[0][...], hessians[shared.products[0]], formats[0], tried_pd)
        else:
            errors_p = part_errors(block, shared, formats, tried_pd, x_ntd, calibration)
        factor_d = tried_pd[int(np.argmin(errors_p))]
        for kernel in kernels:
            kernel[...] = kernel[...] * factor_d[:, None]
        _divide(_find(block, shared.source), factor_d)
        factors |= dict.fromkeys(shared.products, factor_d)
    return factors


def tried_factors(mean_d: Array) -> Array:
    """Candidate factors (powers, d): powers of the mean magnitude of each input, scaled so that maximum x minimum is 1.

    Args:
      mean_d: mean magnitude of each input, (d,).
    """
    factors_pd = jnp.maximum(mean_d ** (jnp.arange(POWERS) / POWERS)[:, None], SMALLEST_FACTOR)
    return factors_pd / jnp.sqrt(factors_pd.max(1, keepdims=True) * factors_pd.min(1, keepdims=True))


@partial(jax.jit, static_argnames="format")
def product_errors(w_df: Array, hessian_dd: Array, format: Format, factors_pd: Array) -> Array:
    """Squared error of a product's output, summed over tokens, for each candidate of its input factors.

    Args:
      w_df: the matrix (d, f).
      hessian_dd: sum of ``x x^T`` of its inputs.
      format: to which the matrix is rounded.
      factors_pd: the candidates (p, d).

    Returns:
      (p,) errors.
    """

    def error(factor_d: Array) -> Array:
        change_df = _rounded(w_df, factor_d, format) - w_df
        return (jnp.matmul(hessian_dd, change_df, precision="highest") * change_df).sum()

    return jax.lax.map(error, factors_pd)


def part_errors(
    block: Block,
    shared: Shared,
    formats: tuple[Format, ...],
    factors_pd: Array,
    x_ntd: np.ndarray,
    calibration: CalibrationRows,
) -> np.ndarray:
    """Squared error of the output of a part of a block, summed over tokens, for each candidate of the input factors.

    Args:
      block: not changed.
      shared: the part of the block, and the products in it that are rounded; its other matrices stay float.
      formats: number format of each of these products.
      factors_pd: the candidates (p, d).
      x_ntd, calibration: see ``scale_inputs``.

    Returns:
      (p,) errors.
    """
    graph, state = nnx.split(in_float(block))
    total_p = np.zeros(len(factors_pd))
    for rows in calibration.batches():
        where = calibration.positions[rows], calibration.segments[rows]
        limit = calibration.norm_limit
        total_p += np.asarray(_part_errors(graph, shared, formats, limit, state, factors_pd, x_ntd[rows], *where))
    return total_p


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _part_errors(
    graph, shared: Shared, formats, norm_limit, state, factors_pd, x_btd, positions_bt, segments_bt
) -> Array:
    assert shared.part is not None  # otherwise ``product_errors`` decides
    block, valid_bt = nnx.merge(graph, state), segments_bt > 0
    tap = Tap(block, f"{shared.part}_norm", valid_bt)
    block(x_btd, positions_bt, segments_bt)
    part_graph, part_state = nnx.split(getattr(block, shared.part))

    def output(factor_d: Array | None) -> Array:
        part = nnx.merge(part_graph, part_state, copy=True)
        if factor_d is not None:
            for name, format in zip(shared.products, formats, strict=True):
                kernel = _find(part, f"{name.removeprefix(f'{shared.part}/')}/kernel")
                kernel[...] = _rounded(kernel[...], factor_d, format)
        if shared.part == "attention":
            out_btd = part(tap.given_btd, positions_bt, segments_bt)
        else:
            out_btd, _ = part(tap.given_btd)
        return jnp.where(valid_bt[..., None], out_btd.astype(jnp.float32), 0)

    before_btd = output(None)
    # The error of a token with massive activations counts no more than that of another.
    weight_bt1 = limiting_factor(before_btd.reshape(-1, before_btd.shape[-1]), norm_limit).reshape(*valid_bt.shape, 1)
    return jax.lax.map(lambda factor_d: jnp.square(weight_bt1 * (output(factor_d) - before_btd)).sum(), factors_pd)


def is_clipped(name: str) -> bool:
    """Whether a product's weights may be clipped: not those of queries and keys, which only matter as a product."""
    return name not in ("attention/query", "attention/key")


def _rounded(w_df: Array, factor_d: Array, format: Format) -> Array:
    """The matrix rounded with its rows multiplied by factors, and then divided by them again."""
    return fake_quantize(w_df * factor_d[:, None], format) / factor_d[:, None]


def _divide(source: nnx.Module, factor_d: Array) -> None:
    """Divides the output of a norm or a dense product by factors, in place."""
    for name in ("kernel", "scale", "bias"):
        if hasattr(source, name):
            variable = getattr(source, name)
            shift = name == "scale" and isinstance(source, RMSNorm) and source.zero_centered
            variable[...] = (1 + variable[...]) / factor_d - 1 if shift else variable[...] / factor_d


def _find(module: nnx.Module, path: str):
    found = module
    for name in path.split("/"):
        found = getattr(found, name)
    return found
