"""Conversion of a float model, or of one trained for quantisation, into a model with quantised weight storage."""

import dataclasses
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.compress.layerwise.calibration import (
    CalibrationRows,
    CalibrationSize,
    hessians,
    idle_experts,
    input_samples,
    matrix_errors,
    unreached,
)
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.layerwise.second_order import FactoredHessian, damped, gptq
from efftrain.compress.quantization.awq import is_clipped, scale_inputs
from efftrain.compress.quantization.clipping import clipped, clipped_step
from efftrain.errors import ConfigError
from efftrain.models.block import Block
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe.layer import RoutedExperts
from efftrain.models.quantization import Quantization, give_rules, matrices, quantized, rule_of, store
from efftrain.ops.masks import count_zeros
from efftrain.ops.number_formats import format_name
from efftrain.ops.quantize import QuantizedArray

Method = Literal["rtn", "gptq", "awq"]


@dataclass(frozen=True)
class Converted:
    """What a conversion did to one matrix of one layer.

    Attributes:
      name: name of the matrix in the model, with the number of the layer in place of its position in the pattern.
      format: number format, such as int4:g32; the name of the dtype, such as "float32", if it was not quantised.
      method: the method by which it was converted; "none" if it was not.
      why: the reason if it was not converted, or not exactly by the requested method; otherwise empty.
      bytes_before, bytes_after: bytes of the matrix, with the scales.
      weight_error: root mean square of the change of the weights over that of the weights.
      output_error: the same for the outputs on the calibration text, in which no token counts for more than
        ``CalibrationRows.norm_limit`` allows; None if the inputs were not observed.
      token_error: the same with every token's error relative to its own output; see ``calibration.MatrixErrors``.
      sparsity: share of the stored numbers that are zero, from pruning or from rounding.
      damping: of "gptq" and "sparsegpt", see ``second_order.inverse_factor``; None with other methods.
    """

    name: str
    format: str
    method: str
    why: str
    bytes_before: int
    bytes_after: int
    weight_error: float
    output_error: float | None
    token_error: float | None
    sparsity: float
    damping: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, matrix by matrix.

    Attributes:
      matrices: in the order of the model.
      calibration: size of the calibration text; None if no text was read.
      idle_experts: for each layer with such experts, by a name such as ``blocks/3/mlp``, the numbers of the experts
        that no token of the calibration text reached.
    """

    matrices: tuple[Converted, ...]
    calibration: CalibrationSize | None = None
    idle_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def bytes_share(self) -> float | None:
        """Bytes of the converted matrices after the conversion over those before; None if no matrix was converted."""
        changed = [m for m in self.matrices if m.method != "none"]
        return sum(m.bytes_after for m in changed) / sum(m.bytes_before for m in changed) if changed else None

    def as_json(self) -> dict[str, Any]:
        return {"bytes_share": self.bytes_share} | dataclasses.asdict(self)


def convert(
    layerwise: LayerwiseModel,
    quantization: Quantization,
    *,
    method: Method = "rtn",
    calibration: CalibrationRows | None = None,
    unrolled: bool = False,
    each_layer: Callable[[int], None] = lambda number: None,
) -> tuple[Decoder, ConversionReport]:
    """Quantises the weights of a model layer by layer, and frees each float layer before the next one.

    The scales are the steps that were learned in training, if the model was trained with the same rules; otherwise they
    follow from the largest magnitudes.

    Args:
      layerwise: the model, taken apart; its list of layers is empty afterwards.
      quantization: rules of the new model; its field ``stored`` is ignored, since the result is always stored
        quantised.
      method: "rtn" rounds to the nearest value. "gptq" and "awq" also use the inputs on the calibration text,
        computed by the layers that are already converted; they apply to dense products of plain blocks, and all other
        matrices are rounded.
      calibration: the text that "gptq" and "awq" need.
      unrolled: give the new model a pattern that contains every layer, as rules for single layers need it.
      each_layer: called after each layer with the number of layers that are done.

    Returns:
      The new model and a report for each matrix.

    Raises:
      ConfigError: the model is converted already, a rule matches nothing or does not fit, or calibration text is
        missing.
    """
    if method not in get_args(Method):
        raise ConfigError(f"the method is {method!r}; use one of {', '.join(get_args(Method))}")
    if layerwise.config.quantization.stored:
        raise ConfigError("the model is converted already; convert the one it was made from")
    if method != "rtn" and calibration is None:
        raise ConfigError(f"the method {method!r} needs calibration text; give a corpus")
    config = layerwise.unrolled() if unrolled else layerwise.config
    config = config.replace(quantization=dataclasses.replace(quantization, stored=True))
    abstract_decoder(config)  # raises an error for rules that do not fit, before anything is computed

    rows: list[Converted] = []
    all_idle: dict[str, tuple[int, ...]] = {}
    outer = layerwise.outer
    give_rules(outer, quantization)
    observe = method != "rtn"
    n_positions, states = len(config.pattern), []
    for number, layer, inputs in layerwise.iterate_layers("convert", calibration if observe else None):
        give_rules(layer, quantization, f"blocks/{number % n_positions}/")
        plain, found = isinstance(layer, Block), {} if inputs is None else hessians(layer, *inputs)
        samples = {} if inputs is None else input_samples(layer, *inputs)
        factored: dict[int, FactoredHessian] = {}  # by the identity of the Hessian, which products share
        idle = () if inputs is None else idle_experts(layer, *inputs)
        if idle:
            all_idle[f"blocks/{number}/mlp"] = idle
        factors = {}
        if method == "awq" and isinstance(layer, Block) and inputs is not None:
            factors = scale_inputs(layer, *inputs, found)
        observed = found.keys() & {name for name, _, _ in matrices(layer)}
        for name, module, attribute in list(matrices(layer)):
            how, why = _how(name, getattr(module, attribute), method, plain, observed, factors)
            if isinstance(module, RoutedExperts):
                why += unreached(idle)
            seen = None
            if name in found:
                hessian, sample = found.pop(name), samples.pop(name)
                if name in factors:  # the inputs have been divided by the factors
                    hessian, sample = hessian / jnp.outer(factors[name], factors[name]), sample / factors[name]
                if how == "gptq" and id(hessian) not in factored:
                    factored = {id(hessian): FactoredHessian.of(hessian)}
                seen = _Seen(hessian, sample, factored.get(id(hessian)))
                del hessian
            clip = how == "awq" and is_clipped(name)
            rows.append(_convert(f"blocks/{number}/{name}", module, attribute, how, why, seen, clip=clip))
            del seen  # free its memory before the next matrix
        states.append(nnx.state(layer))
        each_layer(number + 1)
    for name, module, attribute in list(matrices(outer)):
        if not name.startswith("blocks/"):
            why = f"{method} applies only to the products of blocks" if observe else ""
            rows.append(_convert(name, module, attribute, "rtn", why, None))
    size = calibration.size if observe and calibration is not None else None
    return assemble(config, outer, states), ConversionReport(tuple(rows), size, all_idle)


def _how(
    name: str, variable: nnx.Variable, method: Method, plain: bool, observed: Set[str], factors: Mapping[str, Array]
) -> tuple[str, str]:
    """The method by which a matrix is converted, and the reason if it is not the requested one."""
    if method == "rtn":
        return method, ""
    if not plain:
        return "rtn", f"{method} applies only to plain blocks"
    if name not in observed:
        return "rtn", f"{method} applies only to dense products"
    rule = rule_of(variable)
    if rule is not None and rule.learned_step:
        return "rtn", "its steps were learned"
    if method == "awq" and name not in factors:
        why = "its inputs cannot be scaled: no weights before it, or another product of the same inputs is not scaled"
        return (method, f"only clipped; {why}") if is_clipped(name) else ("rtn", why)
    return method, ""


@dataclass(frozen=True)
class _Seen:
    """What was seen of the inputs of a matrix."""

    hessian_dd: Array
    sample_nd: Array
    factored: FactoredHessian | None


def _convert(
    name: str, module: nnx.Module, attribute: str, method: str, why: str, seen: _Seen | None, *, clip: bool = False
) -> Converted:
    variable = getattr(module, attribute)
    rule, before, n_bytes = rule_of(variable), variable[...], variable.size * variable.dtype.itemsize
    if rule is None or rule.weights is None:
        zeros, why = count_zeros(before) / before.size, "no rule sets a number format for its weights"
        return Converted(name, str(variable.dtype), "none", why, n_bytes, n_bytes, 0.0, None, None, zeros)
    damping = None
    if method == "gptq":
        assert seen is not None  # its inputs were seen
        assert seen.factored is not None
        step_gf = clipped_step(before, seen.hessian_dd, rule.weights)
        value, damping = gptq(before, seen.factored, rule.weights, step_gf), seen.factored.damping
        why = damped(damping)
    elif clip:
        assert seen is not None  # its inputs were seen
        value = clipped(before, seen.hessian_dd, rule.weights)
    else:
        value = quantized(module, attribute)
    after = value.dequantize()
    errors = matrix_errors(after, before, *((None, None) if seen is None else (seen.hessian_dd, seen.sample_nd)))
    store(module, attribute, value)
    zeros = count_zeros(after) / after.size
    return Converted(
        name,
        format_name(rule.weights),
        method,
        why,
        n_bytes,
        quantized_bytes(value),
        errors.weights,
        errors.outputs,
        errors.tokens,
        zeros,
        damping,
    )


def quantized_bytes(value: QuantizedArray) -> int:
    """Bytes of the stored integers and the scales of a quantised matrix."""
    return sum(a.size * a.dtype.itemsize for a in (value.packed, value.scale))
