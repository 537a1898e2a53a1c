"""AWQ: inputs that matter are scaled up before weights are rounded, and large weights are clipped where that helps.

Input channel j of some products is multiplied by f_j in their matrix and divided by it where it comes from, which
changes nothing but what rounding does. Source: Lin et al. 2024 (AWQ), section 3.2; which output the errors are of, and
the search for clips, as in the authors' llm-awq.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.compress.layerwise.calibration import CalibrationRows, Hessians, Tap, magnitudes
from efftrain.models.attention import SelfAttention
from efftrain.models.block import Block
from efftrain.models.mlp import SwiGLU
from efftrain.models.quantization import in_float, rule_of
from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import (
    QuantizedArray,
    fake_quantize,
    group_size,
    learned_quantize,
    quantize,
    step_of,
    stored_scale,
)

POWERS = 20  # of the mean magnitude of an input that are tried, from 0 to 1
SMALLEST_FACTOR = 1e-4
CLIPS = tuple(1 - i / 20 for i in range(10))  # shares of the largest magnitude that are tried


@dataclass(frozen=True)
class Shared:
    """Products of one input.

    Attributes:
      source: path in the block of the parameter that the input can be divided in.
      products: their paths in the block.
      part: of the block, whose output says how good factors are. None: that of the product, which is the only one.
    """

    source: str
    products: tuple[str, ...]
    part: Literal["attention", "mlp"] | None = None


def shared_inputs(block: Block) -> list[Shared]:
    """What can be scaled in a plain block, in the order in which it is to be done."""
    found = []
    if isinstance(block.attention, SelfAttention):
        names = ("attention/query", "attention/key", "attention/value")
        found.append(Shared("attention_norm/scale", names, "attention"))
        config = block.attention.config
        if config.n_heads == config.n_kv_heads:  # else several heads read one value
            found.append(Shared("attention/value/kernel", ("attention/out",)))
    if isinstance(block.mlp, SwiGLU):
        found.append(Shared("mlp/up/kernel", ("mlp/down",)))
        found.append(Shared("mlp_norm/scale", ("mlp/gate", "mlp/up"), "mlp"))
    # The scaled values and units must not be rounded before they are scaled themselves: sources first.
    return sorted(found, key=lambda shared: shared.source.endswith("scale"))


def scale_inputs(block: Block, x_ntd: np.ndarray, calibration: CalibrationRows, hessians: Hessians) -> dict[str, Array]:
    """Scales a plain block, whose matrices have their rules, in place; not those whose steps were learned.

    Args:
      block: whose matrices are float.
      x_ntd, calibration: what it reads, and the text that this is of.
      hessians: ``calibration.hessians`` of these.

    Returns:
      The factors (d_in,) of each product that was scaled.
    """
    factors: dict[str, Array] = {}
    sums = magnitudes(block, x_ntd, calibration)
    for shared in shared_inputs(block):
        kernels = [_find(block, f"{name}/kernel") for name in shared.products]
        rules = [rule_of(kernel) for kernel in kernels]
        if any(rule is None or rule.weights is None or rule.learned_step for rule in rules):
            continue
        formats = tuple(rule.weights for rule in rules)
        tried_pd = tried_factors(sums[shared.products[0]] / calibration.size.tokens)
        if shared.part is None:
            errors_p = product_errors(kernels[0][...], hessians[shared.products[0]], formats[0], tried_pd)
        else:
            errors_p = part_errors(block, shared, formats, tried_pd, x_ntd, calibration)
        factor_d = tried_pd[int(np.argmin(errors_p))]
        for kernel in kernels:
            kernel[...] = kernel[...] * factor_d[:, None]
        source = _find(block, shared.source)
        source[...] = source[...] / factor_d  # of a kernel the columns, of a norm its scale
        factors |= dict.fromkeys(shared.products, factor_d)
    return factors


def tried_factors(mean_d: Array) -> Array:
    """(powers, d): the mean magnitude of each input to powers from 0 to 1; the largest times the least is 1."""
    factors_pd = jnp.maximum(mean_d ** (jnp.arange(POWERS) / POWERS)[:, None], SMALLEST_FACTOR)
    return factors_pd / jnp.sqrt(factors_pd.max(1, keepdims=True) * factors_pd.min(1, keepdims=True))


@partial(jax.jit, static_argnames="format")
def product_errors(w_df: Array, hessian_dd: Array, format: Format, factors_pd: Array) -> Array:
    """(p,) sums over tokens of the squared change of a product's output, for each of the factors of its inputs."""

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
    """(p,) sums over tokens of the squared change of the output of a part of a block, its other matrices in float.

    Args:
      block: stays as it is.
      shared: which part, and which of its products are rounded.
      formats: of each of these.
      factors_pd: of their inputs.
      x_ntd, calibration: what the block reads, and the text that this is of.
    """
    graph, state = nnx.split(in_float(block))
    total_p = np.zeros(len(factors_pd))
    for rows in calibration.batches():
        where = calibration.positions[rows], calibration.segments[rows]
        total_p += np.asarray(_part_errors(graph, shared, formats, state, factors_pd, x_ntd[rows], *where))
    return total_p


@partial(jax.jit, static_argnums=(0, 1, 2))
def _part_errors(graph, shared: Shared, formats, state, factors_pd, x_btd, positions_bt, segments_bt) -> Array:
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
    return jax.lax.map(lambda factor_d: jnp.square(output(factor_d) - before_btd).sum(), factors_pd)


def is_clipped(name: str) -> bool:
    """Whether a product's weights may be clipped: queries and keys only matter multiplied with each other."""
    return name not in ("attention/query", "attention/key")


def clipped(w_df: Array, hessian_dd: Array, format: Format) -> QuantizedArray:
    """The matrix quantised after the largest weights of each group are clipped where its outputs change less by that.

    For each group of inputs and each output by itself, on all tokens.

    Args:
      w_df: (d, f).
      hessian_dd: of its inputs.
      format: of the result.
    """
    return quantize(w_df, format, scale=stored_scale(_clipped_step(w_df, hessian_dd, format), format))


@partial(jax.jit, static_argnames="format")
def _clipped_step(w_df: Array, hessian_dd: Array, format: Format) -> Array:
    (d, f), size = w_df.shape, group_size(len(w_df), format)
    n = d // size
    # Of each group the products of its own inputs.
    hessian_gss = hessian_dd.reshape(n, size, n, size)[jnp.arange(n), :, jnp.arange(n)]
    w_df, step_gf = w_df.astype(jnp.float32), step_of(w_df, format)

    def errors(share: Array) -> Array:
        change_gsf = (learned_quantize(w_df, step_gf * share, format) - w_df).reshape(n, size, f)
        return (jnp.einsum("gst,gtf->gsf", hessian_gss, change_gsf, precision="highest") * change_gsf).sum(1)

    clips = jnp.array(CLIPS)
    return step_gf * clips[jnp.argmin(jax.lax.map(errors, clips), axis=0)]


def _rounded(w_df: Array, factor_d: Array, format: Format) -> Array:
    """What rounding leaves of a matrix whose inputs are divided by factors, for the inputs as they were."""
    return fake_quantize(w_df * factor_d[:, None], format) / factor_d[:, None]


def _find(module: nnx.Module, path: str):
    found = module
    for name in path.split("/"):
        found = getattr(found, name)
    return found
