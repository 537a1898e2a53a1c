"""Quantised arrays: numbers with their scales, the fake quantisation of quantisation-aware training, and products.

Scales are rounded to their stored dtype *before* the numbers are quantised, so that training uses the values that are
stored later. A group of zeros has scale 1. The formats, and the convention for scales, are in ``ops.number_formats``.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError
from efftrain.ops.number_formats import Format

SMALLEST_SCALE = 1e-30  # dividing by a smaller scale is not finite; such numbers count as zero


@partial(jax.tree_util.register_dataclass, data_fields=("packed", "scale"), meta_fields=("format", "axis", "group"))
@dataclass(frozen=True)
class QuantizedArray:
    """Quantised numbers and their scales.

    Attributes:
      packed: int8 or float8, in the shape of the array except along ``axis``, along which an int8 may hold several
        levels, the first in the lowest bits.
      scale: like the array, but with the number of groups along ``axis``.
      format: number format.
      axis: the contraction, negative, so that a stack of quantised arrays is a quantised array too.
      group: number of consecutive numbers along ``axis`` that share a scale.
    """

    packed: Array
    scale: Array
    format: Format
    axis: int
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array before packing."""
        shape = list(self.packed.shape)
        shape[self.axis] *= 8 // self.format.storage_bits
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.packed.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def levels(self) -> Array:
        """Returns the numbers before scaling, int8 or float8."""
        return unpack(self.packed, self.format, self.axis)

    @partial(jax.jit, inline=True)  # one small program for each shape instead of a dozen
    def dequantize(self) -> Array:
        """Returns float32 numbers in the original shape."""
        return _scaled(self.levels().astype(jnp.float32), self.scale, self.group, self.axis)


def group_size(length: int, format: Format) -> int:
    """Returns how many numbers share a scale along a contraction of this length.

    Raises:
      ConfigError: the group does not divide the length, or packing does not fill whole bytes.
    """
    size = length if format.group is None else format.group
    if length % size:
        fitting = max(n for n in range(1, size + 1) if length % n == 0)
        raise ConfigError(f"the group of {size} does not divide {length} inputs; use a group of {fitting}")
    if length % (8 // format.storage_bits):
        raise ConfigError(
            f"{length} inputs of {format.storage_bits} bits do not fill whole bytes; make it a multiple of "
            f"{8 // format.storage_bits}"
        )
    return size


def step_of(x: Array, format: Format, axis: int = -2) -> Array:
    """Returns the scales of an array, one per group along ``axis``, in float32, before rounding to ``scale_dtype``."""
    step = format.step(_grouped(x.astype(jnp.float32), group_size(x.shape[axis], format), axis), axis)
    return jnp.where(step < SMALLEST_SCALE, 1.0, step)


def stored_scale(step: Array, format: Format) -> Array:
    """Converts float32 scales to the format's ``scale_dtype``, with a rounding that XLA cannot remove.

    XLA may remove a conversion that is followed by its inverse, but not ``reduce_precision``.
    """
    rounded = jax.lax.reduce_precision(step, 8, 7) if format.scale_dtype == "bfloat16" else step
    return rounded.astype(format.scale_dtype)


@partial(jax.jit, static_argnames=("format", "axis"), inline=True)
def quantize(x: Array, format: Format, axis: int = -2, *, scale: Array | None = None) -> QuantizedArray:
    """Quantises an array to the nearest numbers of a format.

    Args:
      x: (...) of any float dtype.
      format: number format.
      axis: the contraction, negative, along which scales are shared.
      scale: scales to use, in ``scale_dtype``. None: those of ``step_of``, rounded to ``scale_dtype``.
    """
    size = group_size(x.shape[axis], format)
    scale = stored_scale(step_of(x, format, axis), format) if scale is None else scale
    levels = format.nearest(_unscaled(x.astype(jnp.float32), scale, size, axis)).astype(format.dtype)
    return QuantizedArray(pack(levels, format, axis), scale, format, axis, size)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def fake_quantize(x: Array, format: Format, axis: int = -2) -> Array:
    """The values of ``quantize(x, format, axis).dequantize()`` in x's dtype, with a straight-through gradient.

    ``x + stop_gradient(q - x)`` would be off by a rounding, and a later conversion would not give the trained values.

    Source: Bengio et al. 2013 (straight-through estimator). Clipped numbers have a gradient too, because clipping
    changes a number by at most half a step.
    """
    size = group_size(x.shape[axis], format)
    scale = stored_scale(step_of(x, format, axis), format)
    levels = format.nearest(_unscaled(x.astype(jnp.float32), scale, size, axis))
    return _scaled(levels, scale, size, axis).astype(x.dtype)


def _fake_forward(x: Array, format: Format, axis: int) -> tuple[Array, None]:
    return fake_quantize(x, format, axis), None


def _fake_backward(format: Format, axis: int, saved: None, gradient: Array) -> tuple[Array]:
    return (gradient,)


fake_quantize.defvjp(_fake_forward, _fake_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def learned_quantize(x: Array, step: Array, format: Format, axis: int = -2) -> Array:
    """``fake_quantize`` with learned scales.

    Args:
      x: (...) float32.
      step: float32 scales, one per group along ``axis``, positive; rounded to the format's ``scale_dtype`` here.
      format: Integer or Ternary.
      axis: the contraction, negative.

    Returns:
      The quantised values, like x. The gradient of x is zero where x is clipped. The gradient of a step is the sum over
      its group of ``round(v) - v`` inside the range and of the clipping level outside, with ``v = x / step``, divided
      by the root of (numbers in a group x greatest level).

    Source: Esser et al. 2020 (LSQ), equations 3 and 5, section 2.2.
    """
    size, scale = group_size(x.shape[axis], format), stored_scale(step, format)
    return _scaled(format.nearest(_unscaled(x, scale, size, axis)), scale, size, axis)


def _learned_forward(x: Array, step: Array, format: Format, axis: int) -> tuple[Array, tuple[Array, Array]]:
    return learned_quantize(x, step, format, axis), (x, step)


def _learned_backward(format: Format, axis: int, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, step = saved
    size = group_size(x.shape[axis], format)
    v = _unscaled(x, stored_scale(step, format), size, axis)
    low, high = format.levels
    inside = (v >= low) & (v <= high)
    slope = jnp.where(inside, jnp.round(v) - v, jnp.clip(v, low, high))
    d_step = _grouped(gradient * slope, size, axis).sum(axis) / math.sqrt(size * high)
    return jnp.where(inside, gradient, 0), d_step


learned_quantize.defvjp(_learned_forward, _learned_backward)


def pack(levels: Array, format: Format, axis: int = -2) -> Array:
    """Packs int8 levels, several to a byte along ``axis``; float8 and 8-bit levels are returned unchanged."""
    bits = format.storage_bits
    if bits == 8:
        return levels
    parts = _grouped(levels, 8 // bits, axis).astype(jnp.uint8)
    mask = jnp.uint8(2**bits - 1)
    fields = [jnp.take(parts, i, axis=axis) & mask for i in range(8 // bits)]
    packed = sum((f << (bits * i) for i, f in enumerate(fields)), jnp.zeros_like(fields[0]))
    return jax.lax.bitcast_convert_type(packed, jnp.int8)


def unpack(packed: Array, format: Format, axis: int = -2) -> Array:
    """Inverse of ``pack``."""
    bits = format.storage_bits
    if bits == 8:
        return packed
    # Shifted up, then down again, because right shifts of int8 keep the sign.
    fields = [(packed << (8 - bits * (i + 1))) >> (8 - bits) for i in range(8 // bits)]
    stacked = jnp.stack(fields, axis=axis)
    shape = list(packed.shape)
    shape[axis] *= 8 // bits
    return stacked.reshape(shape)


def quantized_product(x_nd: Array, kernel: QuantizedArray, activations: Format) -> Array:
    """(n, d) @ (d, f) -> (n, f) float32, computed in the quantised dtype, without making a float matrix.

    Args:
      x_nd: float activations, quantised here with one scale per row.
      kernel: with one scale per column, along axis -2, in the dtype of the quantised activations.
      activations: number format of x.

    Returns:
      The same as ``fake_quantized_product``; integers are summed exactly, in int32.
    """
    n = len(x_nd)
    if n == 1:  # XLA on CPU computes a product with one row in float, which takes longer than one with two rows
        x_nd = jnp.pad(x_nd, ((0, 1), (0, 0)))
    x = quantize(x_nd, activations, -1)
    total = jnp.int32 if activations.dtype == "int8" else jnp.float32
    product = jax.lax.dot_general(x.levels(), kernel.levels(), (((1,), (0,)), ((), ())), preferred_element_type=total)
    return _rescaled(product, x.scale, kernel.scale)[:n]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def fake_quantized_product(x_nd: Array, kernel_df: Array, activations: Format, format: Format) -> Array:
    """``quantized_product`` of float matrices, for training: float32 with straight-through gradients.

    Levels are multiplied as floats. They are small integers, which every float dtype holds, and their sums are exact in
    float32 up to 1,040 inputs and nearly always beyond that: bitwise equal to the product of integers.
    """
    x = _levels(x_nd, activations, -1)
    kernel = _levels(kernel_df, format, -2)
    product = jnp.matmul(x[0].astype(x_nd.dtype), kernel[0].astype(x_nd.dtype), preferred_element_type=jnp.float32)
    return _rescaled(product, x[1], kernel[1])


def _product_forward(x_nd: Array, kernel_df: Array, activations: Format, format: Format) -> tuple[Array, tuple]:
    return fake_quantized_product(x_nd, kernel_df, activations, format), (x_nd, kernel_df)


def _product_backward(activations: Format, format: Format, saved: tuple, gradient_nf: Array) -> tuple[Array, Array]:
    x_nd, kernel_df = saved
    gradient_nf = gradient_nf.astype(x_nd.dtype)
    x = fake_quantize(x_nd, activations, -1)
    kernel = fake_quantize(kernel_df, format, -2).astype(x_nd.dtype)
    dx_nd = gradient_nf @ kernel.T
    d_kernel_df = jnp.matmul(x.T, gradient_nf, preferred_element_type=jnp.float32)
    return dx_nd.astype(x_nd.dtype), d_kernel_df.astype(kernel_df.dtype)


fake_quantized_product.defvjp(_product_forward, _product_backward)


def _levels(x: Array, format: Format, axis: int) -> tuple[Array, Array]:
    """Returns float32 levels with one scale along the axis, and the scales."""
    scale = stored_scale(step_of(x, format, axis), format)
    return format.nearest(_unscaled(x.astype(jnp.float32), scale, x.shape[axis], axis)), scale


def _rescaled(product_nf: Array, x_scale: Array, kernel_scale: Array) -> Array:
    return product_nf.astype(jnp.float32) * x_scale.astype(jnp.float32) * kernel_scale.astype(jnp.float32)


def multiplies_quantized(format: Format | None, activations: Format | None) -> bool:
    """Returns whether ``quantized_product`` supports the formats: one 1-byte dtype, a scale per row and per column."""
    if format is None or activations is None or format.storage_bits != 8:
        return False
    return activations.dtype == format.dtype and format.group is activations.group is None


def _grouped(x: Array, size: int, axis: int) -> Array:
    """Splits ``axis`` into two: the group at ``axis - 1``, and the number within it at ``axis``."""
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _unscaled(x: Array, scale: Array, size: int, axis: int) -> Array:
    return (_grouped(x, size, axis) / jnp.expand_dims(scale.astype(jnp.float32), axis)).reshape(x.shape)


def _scaled(levels: Array, scale: Array, size: int, axis: int) -> Array:
    grouped = _grouped(levels, size, axis) * jnp.expand_dims(scale.astype(jnp.float32), axis)
    return grouped.reshape(levels.shape)
