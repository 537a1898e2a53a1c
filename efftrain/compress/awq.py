"""Scaling up the inputs that matter, before weights are rounded: AWQ.

Input channel j of some products is multiplied by f_j in their matrix and divided by it where it comes from, which
changes nothing but what rounding does. Source: Lin et al. 2024 (AWQ), section 3.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.compress.observe import Grams
from efftrain.models.attention import SelfAttention
from efftrain.models.block import Block
from efftrain.models.mlp import SwiGLU
from efftrain.models.quantization import rule_of
from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import fake_quantize

POWERS = 20  # of the mean input that are tried, from 0 to 1


@dataclass(frozen=True)
class Shared:
    """Products of one input, by their paths in the block, and the parameter that the input can be divided in."""

    source: str
    products: tuple[str, ...]


def shared_inputs(block: Block) -> list[Shared]:
    """What can be scaled in a plain block, in the order in which it is to be done."""
    found = []
    if isinstance(block.attention, SelfAttention):
        found.append(Shared("attention_norm/scale", ("attention/query", "attention/key", "attention/value")))
        config = block.attention.config
        if config.n_heads == config.n_kv_heads:  # else several heads read one value
            found.append(Shared("attention/value/kernel", ("attention/out",)))
    if isinstance(block.mlp, SwiGLU):
        found.append(Shared("mlp/up/kernel", ("mlp/down",)))
        found.append(Shared("mlp_norm/scale", ("mlp/gate", "mlp/up")))
    # The scaled values and units must not be rounded before they are scaled themselves: sources first.
    return sorted(found, key=lambda shared: shared.source.endswith("scale"))


def scale_inputs(block: Block, grams: Grams) -> dict[str, Array]:
    """Scales a plain block, whose matrices have their rules, in place; not those whose steps were learned.

    Returns:
      The factors (d_in,) of each product that was scaled.
    """
    factors: dict[str, Array] = {}
    for shared in shared_inputs(block):
        kernels = [_find(block, f"{name}/kernel") for name in shared.products]
        rules = [rule_of(kernel) for kernel in kernels]
        if any(rule is None or rule.weights is None or rule.learned_step for rule in rules):
            continue
        formats = [rule.weights for rule in rules]
        factor_d = best_factor([kernel[...] for kernel in kernels], grams[shared.products[0]], formats)
        for kernel in kernels:
            kernel[...] = kernel[...] * factor_d[:, None]
        source = _find(block, shared.source)
        source[...] = source[...] / factor_d  # of a kernel the columns, of a norm its scale
        factors |= dict.fromkeys(shared.products, factor_d)
    return factors


def best_factor(weights: Sequence[Array], gram_dd: Array, formats: Sequence[Format]) -> Array:
    """The factors (d,) of the inputs with which the outputs of the rounded products change least.

    Args:
      weights: (d, f) each.
      gram_dd: of the input that they share.
      formats: of each.
    """
    return _best_factor(tuple(weights), gram_dd, tuple(formats))


@partial(jax.jit, static_argnames="formats")
def _best_factor(weights: tuple[Array, ...], gram_dd: Array, formats: tuple[Format, ...]) -> Array:
    size_d = jnp.sqrt(jnp.maximum(jnp.diag(gram_dd), 1e-20))

    def factor(power: Array) -> Array:
        f_d = size_d**power
        return f_d / jnp.sqrt(f_d.max() * f_d.min())

    def loss(power: Array) -> Array:
        f_d1 = factor(power)[:, None]
        changes = [fake_quantize(w * f_d1, format) / f_d1 - w for w, format in zip(weights, formats, strict=True)]
        return sum((jnp.matmul(gram_dd, c, precision="highest") * c).sum() for c in changes)

    powers = jnp.arange(POWERS) / POWERS
    return factor(powers[jnp.argmin(jax.lax.map(loss, powers))])


def _find(block: Block, path: str):
    found = block
    for name in path.split("/"):
        found = getattr(found, name)
    return found
