"""Quantisation of a model: which matrices are quantised, and how a module reads one in training and when stored.

Every dense product's kernel, the experts' kernels and the embedding table are a ``Matrix``. A module reads it through
``read``, which returns the float matrix, the values that it would have after quantisation (in training), or those that
were stored. The rule is in the variable's metadata; a stored matrix has variables of its own, which are not trained.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.ops.number_formats import AnyFormat, Float8, Format
from efftrain.ops.platform import platform
from efftrain.ops.quantize import (
    QuantizedArray,
    fake_quantize,
    fake_quantized_product,
    group_size,
    learned_quantize,
    multiplies_quantized,
    quantize,
    quantized_product,
    step_of,
    stored_scale,
)

ModelT = TypeVar("ModelT", bound=nnx.Module)
RATIO = "_step_ratio"  # suffix of a matrix's name
SMALLEST_RATIO = 0.05  # lower bound of a learned step, relative to the step of the largest magnitude
MULTIPLIES_FLOAT8 = {"tpu", "gpu"}  # not measured; on CPU such a product is computed in float


@dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """How some matrices are quantised.

    Attributes:
      layers: a regular expression that must match the whole name of a matrix, such as ``blocks/.*``,
        ``.*/attention/.*`` or ``embedding``. Names are paths in the model: ``blocks/0/mlp/up``, where 0 is the position
        in the pattern.
      weights: number format of the matrix. None: float.
      activations: number format of the input of a dense product, with one scale per token. None: float. The inputs of
        experts, embedding and head are always float.
      learned_step: train the scales too (LSQ); for 4 bits and fewer.
    """

    layers: str = "blocks/.*"
    weights: AnyFormat | None = None
    activations: AnyFormat | None = None
    learned_step: bool = False

    def __post_init__(self):
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ConfigError(f"quantization: layers {self.layers!r} is not a regular expression ({error})") from error
        if self.activations is not None and self.activations.group is not None:
            raise ConfigError("quantization: activations have one scale per token; remove their group")
        if self.learned_step and (self.weights is None or isinstance(self.weights, Float8)):
            raise ConfigError(
                "quantization: learned_step needs weights of an integer format; set weights, or remove learned_step"
            )


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Which parts of a model are quantised.

    Attributes:
      rules: the first rule that matches a matrix applies to it; a rule that matches no matrix is an error. Norms and
        routers are always float.
      cache: number format of keys and values in the cache, with one scale per token and head. None: the model's dtype.
      stored: matrices are held in their format and not trained, as in a converted model. False: they are float, and are
        used with the values that they will have when they are stored.
    """

    rules: tuple[QuantizationRule, ...] = ()
    cache: AnyFormat | None = None
    stored: bool = False

    def __post_init__(self):
        if self.cache is not None and self.cache.group is not None:
            raise ConfigError("quantization: the cache has one scale for each token and head; remove its group")


@runtime_checkable
class QuantizesCache(Protocol):
    """A module that keeps ``quantization.cache``, the number format of its keys and values; None: float."""

    cache_format: AnyFormat | None


class Matrix(nnx.Param):
    """A matrix (..., d_in, d_out) that a rule may quantise. Metadata ``contraction``: -2, or -1 for a table."""


class Packed(nnx.Variable):
    """Packed levels of a matrix that is stored quantised. Metadata: those of the ``Matrix``, and ``per_byte``."""


class Scale(nnx.Variable):
    """Scales of a ``Packed`` matrix, under its name with the suffix ``_scale``."""


class StepRatio(nnx.Param):
    """Learned steps divided by those of the largest magnitude, under the matrix's name with the suffix ``_step_ratio``.

    A ratio, so that one learning rate fits all, and steps follow their matrix from the first training step on.
    """


def read(module: nnx.Module, name: str, dtype: Any) -> Array:
    """Returns the matrix ``name`` of a module with the values that its products use."""
    variable = getattr(module, name)
    if isinstance(variable, Packed):
        return stored(module, name).dequantize().astype(dtype)
    rule, matrix = rule_of(variable), variable[...]
    if rule is not None and rule.weights is not None:
        axis = variable.get_metadata()["contraction"]
        if rule.learned_step:
            matrix = learned_quantize(matrix, learned_steps(module, name), rule.weights, axis)
        else:
            matrix = fake_quantize(matrix, rule.weights, axis)
    return matrix.astype(dtype)


def read_rows(module: nnx.Module, name: str, places: Array) -> Array:
    """Looks up rows of a table, (...) integers -> (..., d_model) float32; only these rows are dequantised."""
    variable = getattr(module, name)
    if isinstance(variable, Packed):
        table = stored(module, name)
        return QuantizedArray(table.packed[places], table.scale[places], table.format, -1, table.group).dequantize()
    rows, rule = variable[...][places], rule_of(variable)
    return rows if rule is None or rule.weights is None else fake_quantize(rows, rule.weights, -1)


def product(x_nd: Array, module: nnx.Module, name: str) -> Array:
    """Multiplies with a matrix: (n, d_in) @ matrix -> (n, d_out), in the dtype of x."""
    variable, rule = getattr(module, name), rule_of(getattr(module, name))
    if rule is None:
        return x_nd @ read(module, name, x_nd.dtype)
    weights, activations = rule.weights, rule.activations
    quantizes_both = weights is not None and activations is not None
    if quantizes_both and multiplies_quantized(weights, activations) and not rule.learned_step:
        if not isinstance(variable, Packed):
            return fake_quantized_product(x_nd, variable[...], activations, weights).astype(x_nd.dtype)
        if weights.dtype == "int8" or platform() in MULTIPLIES_FLOAT8:
            return quantized_product(x_nd, stored(module, name), activations).astype(x_nd.dtype)
    if activations is not None:
        x_nd = fake_quantize(x_nd, activations, -1)
    if not isinstance(variable, Packed):
        return x_nd @ read(module, name, x_nd.dtype)
    return x_nd @ _dequantized_for(x_nd, stored(module, name))


def _dequantized_for(x_nd: Array, kernel: QuantizedArray) -> Array:
    """Dequantises a matrix for this product only.

    XLA on CPU moves loop-invariant code out of a loop, so that decoding would hold the whole model in float. Therefore
    the levels are made to depend on x, by an exclusive or with a zero that is computed from x: it is 1 only for a
    number that is both NaN and infinite, which does not exist.
    """
    if platform() != "cpu" or kernel.packed.dtype != jnp.int8:
        return kernel.dequantize().astype(x_nd.dtype)
    first = x_nd.reshape(-1)[0]
    zero = (jnp.isnan(first) & jnp.isinf(first)).astype(jnp.int8)
    kernel = QuantizedArray(kernel.packed ^ zero, kernel.scale, kernel.format, kernel.axis, kernel.group)
    return kernel.dequantize().astype(x_nd.dtype)


def stored(module: nnx.Module, name: str) -> QuantizedArray:
    """Returns a matrix that is stored quantised."""
    variable = getattr(module, name)
    metadata, packed = variable.get_metadata(), variable[...]
    axis, format = metadata["contraction"], metadata["rule"].weights
    group = format.group or packed.shape[axis] * metadata["per_byte"]
    return QuantizedArray(packed, getattr(module, f"{name}_scale")[...], format, axis, group)


def learned_steps(module: nnx.Module, name: str) -> Array:
    """Returns the float32 scales of a matrix whose rule has ``learned_step``; no gradient reaches the matrix."""
    matrix = getattr(module, name)
    step = step_of(jax.lax.stop_gradient(matrix[...]), weights_format(matrix), matrix.get_metadata()["contraction"])
    ratio = getattr(module, f"{name}{RATIO}")[...]
    # The gradient passes straight through the bound; otherwise a step below it would never come back.
    return step * (ratio + jax.lax.stop_gradient(jnp.maximum(ratio, SMALLEST_RATIO) - ratio))


def quantized(module: nnx.Module, name: str) -> QuantizedArray:
    """Quantises a matrix with a rule for its weights, to be stored: exactly the values that ``read`` returns."""
    variable = getattr(module, name)
    format, metadata = weights_format(variable), variable.get_metadata()
    scale = stored_scale(learned_steps(module, name), format) if metadata["rule"].learned_step else None
    return quantize(variable[...], format, metadata["contraction"], scale=scale)


def store(module: nnx.Module, name: str, value: QuantizedArray) -> None:
    """Replaces a float matrix by a quantised one, concrete or abstract."""
    metadata = getattr(module, name).get_metadata()
    kept = {k: metadata[k] for k in ("axes", "units", "active", "passes", "rule", "contraction") if k in metadata}
    axes, units = list(metadata["axes"]), list(metadata["units"])
    axis, per_byte = value.axis, 8 // value.format.storage_bits
    n_packed = value.packed.shape[axis]
    packed_units = [*units]
    packed_units[axis] = n_packed if units[axis] == n_packed * per_byte else math.gcd(units[axis], n_packed)
    axes[axis], units[axis] = "groups", value.scale.shape[axis]
    packed_metadata: dict[str, Any] = kept | {"units": tuple(packed_units), "per_byte": per_byte}
    setattr(module, name, Packed(value.packed, **packed_metadata))
    setattr(module, f"{name}_scale", Scale(value.scale, axes=tuple(axes), units=tuple(units)))
    if hasattr(module, f"{name}{RATIO}"):
        delattr(module, f"{name}{RATIO}")


def rule_of(variable: nnx.Variable) -> QuantizationRule | None:
    """Returns the rule of a matrix; None: it has none."""
    return variable.get_metadata().get("rule")


def weights_format(variable: nnx.Variable) -> Format:
    """Returns the number format of a matrix.

    Raises:
      ValueError: no rule quantises the matrix.
    """
    rule = rule_of(variable)
    if rule is None or rule.weights is None:
        raise ValueError("no rule quantises this matrix; give it one with weights first, see give_rules")
    return rule.weights


def matrices(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, str]]:
    """Yields every matrix that is or may be quantised: its name in the model, the module with it, its attribute."""
    for path, module in nnx.iter_modules(model):
        for name, variable in vars(module).items():
            if isinstance(variable, Matrix | Packed) and variable.get_metadata().get("quantizable", True):
                yield "/".join(map(str, path if name in ("kernel", "table") else (*path, name))), module, name


def prepare(model: nnx.Module, quantization: Quantization) -> None:
    """Gives the matrices of a float model their rules, and quantises them if ``quantization.stored``.

    Raises:
      ConfigError: a rule matches no matrix, or a group does not divide one.
    """
    names = sorted(name for name, _, _ in matrices(model))
    for i, rule in enumerate(quantization.rules):
        if not any(re.fullmatch(rule.layers, name) for name in names):
            raise ConfigError(
                f"quantization.rules[{i}].layers is {rule.layers!r}, which matches no matrix; they are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    give_rules(model, quantization)
    if quantization.stored:
        for _, module, attribute in list(matrices(model)):
            rule = rule_of(getattr(module, attribute))
            if rule is not None and rule.weights is not None:
                store(module, attribute, quantized(module, attribute))


def give_rules(module: nnx.Module, quantization: Quantization, prefix: str = "") -> None:
    """Gives float matrices the first rules that they match, replacing their previous ones.

    Args:
      module: a model, or the part of a model whose name is ``prefix``.
      quantization: has the rules.
      prefix: start of the names of the part's matrices.
    """
    for name, holder, attribute in list(matrices(module)):
        name = f"{prefix}{name}"
        rule = next((rule for rule in quantization.rules if re.fullmatch(rule.layers, name)), None)
        _give_rule(name, holder, attribute, rule)


def in_float(model: ModelT) -> ModelT:
    """Returns the model with neither matrices nor cache quantised: the same arrays, in variables of its own."""
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, jax.tree.map(lambda array: array, state))
    give_rules(twin, Quantization())
    for _, module in nnx.iter_modules(twin):
        if isinstance(module, QuantizesCache):
            module.cache_format = None
    return twin


def _give_rule(name: str, module: nnx.Module, attribute: str, rule: QuantizationRule | None) -> None:
    variable = getattr(module, attribute)
    metadata = variable.get_metadata()
    if metadata.get("rule") == rule:
        return
    variable.set_metadata(rule=rule)
    if hasattr(module, f"{attribute}{RATIO}"):
        delattr(module, f"{attribute}{RATIO}")
    if rule is None or rule.weights is None:
        return
    axis = metadata["contraction"]
    try:
        size = group_size(variable.shape[axis], rule.weights)
    except ConfigError as error:
        raise ConfigError(f"quantization of {name}: {error}") from error
    if rule.learned_step:
        if axis != -2:
            raise ConfigError(
                f"quantization of {name}: learned_step cannot be used for an embedding table; give it a rule without it"
            )
        shape, axes, units = list(variable.shape), list(metadata["axes"]), list(metadata["units"])
        shape[axis] = units[axis] = shape[axis] // size
        axes[axis] = "groups"
        ratio = jnp.ones(shape, jnp.float32)
        setattr(module, f"{attribute}{RATIO}", StepRatio(ratio, axes=tuple(axes), units=tuple(units)))
