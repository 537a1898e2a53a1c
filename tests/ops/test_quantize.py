"""Formats against qwix and NumPy; fake quantisation against what is stored; gradients against the papers' formulas."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix

from efftrain.errors import ConfigError
from efftrain.ops.number_formats import Float8, Integer, Ternary, format_name, parse_format
from efftrain.ops.quantize import (
    fake_quantize,
    fake_quantized_product,
    group_size,
    learned_quantize,
    multiplies_quantized,
    pack,
    quantize,
    quantized_product,
    step_of,
    unpack,
)

FORMATS = [
    Integer(bits=8),
    Integer(bits=8, group=16, scale_dtype="float32"),
    Integer(bits=4),
    Integer(bits=4, group=32),
    Ternary(group=16),
    Float8(),
]


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("qtype", "bits", "group"), [("int8", 8, None), ("int4", 4, None), ("int4", 4, 32)])
@pytest.mark.smoke
def test_levels_and_scales_are_those_of_qwix(qtype, bits, group):
    x = normal(64, 24)
    oracle = qwix.quantize(x, qtype, channelwise_axes=[1], tiled_axes={0: group} if group else None)
    ours = quantize(x, Integer(bits=bits, group=group, scale_dtype="float32"))
    np.testing.assert_array_equal(ours.levels(), oracle.qvalue.astype(jnp.int8))
    np.testing.assert_array_equal(ours.scale, oracle.scale)
    np.testing.assert_array_equal(ours.dequantize(), qwix.dequantize(oracle))


def test_float8_is_that_of_qwix():
    x = normal(64, 24)
    oracle = qwix.quantize(x, "float8_e4m3fn", channelwise_axes=[1])
    ours = quantize(x, Float8(scale_dtype="float32"))
    np.testing.assert_array_equal(ours.scale, oracle.scale)
    np.testing.assert_array_equal(ours.dequantize(), qwix.dequantize(oracle))


def test_a_scale_is_rounded_before_the_numbers_are():
    """By NumPy: levels belong to the scale in bfloat16, which is what is stored."""
    x = np.asarray(normal(32, 8))
    found = quantize(jnp.asarray(x), Integer(bits=4))
    scale = (np.abs(x).max(0) / 7.5).astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.abs(scale - np.abs(x).max(0) / 7.5).max() > 1e-5  # the rounding does something
    np.testing.assert_array_equal(np.asarray(found.scale[0], np.float32), scale)
    np.testing.assert_array_equal(found.levels(), np.clip(np.round(x / scale), -8, 7))


def test_ternary_is_the_mean_magnitude():
    x = np.asarray(normal(32, 8))
    found = quantize(jnp.asarray(x), Ternary(scale_dtype="float32"))
    scale = np.abs(x).mean(0)
    np.testing.assert_allclose(found.scale[0], scale, rtol=1e-6)
    np.testing.assert_array_equal(found.levels(), np.clip(np.round(x / scale), -1, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_training_sees_exactly_what_is_stored(format, axis, dtype):
    x = normal(3, 64, 64).astype(dtype)
    stored = quantize(x, format, axis).dequantize().astype(dtype)
    fake = jax.jit(fake_quantize, static_argnums=(1, 2))(x, format, axis)
    assert fake.dtype == dtype
    np.testing.assert_array_equal(fake, stored)
    assert np.abs(np.asarray(fake - x, np.float32)).max() > 1e-4


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
def test_a_stack_is_quantised_as_its_layers_are(format):
    x = normal(3, 64, 8)
    together = quantize(x, format)
    for i in range(3):
        np.testing.assert_array_equal(together.dequantize()[i], quantize(x[i], format).dequantize())
    assert together.shape == x.shape
    assert together.size == x.size


@pytest.mark.parametrize("format", [Integer(bits=4, group=8), Float8()], ids=format_name)
def test_columns_are_independent(format):
    x, order = normal(32, 8), np.random.default_rng(1).permutation(8)
    np.testing.assert_array_equal(
        quantize(x[:, order], format).dequantize(), quantize(x, format).dequantize()[:, order]
    )


@pytest.mark.parametrize(("format", "per_byte"), [(Integer(bits=8), 1), (Integer(bits=4), 2), (Ternary(), 4)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_packing_is_undone_for_every_level(format, per_byte, axis):
    low, high = (int(level) for level in format.levels)
    levels = jnp.asarray(np.random.default_rng(0).integers(low, high + 1, (2, 8, 16)), jnp.int8)
    packed = pack(levels, format, axis)
    assert packed.dtype == jnp.int8
    assert packed.size == levels.size // per_byte
    np.testing.assert_array_equal(unpack(packed, format, axis), levels)


def test_the_first_of_two_levels_is_in_the_low_bits():
    packed = pack(jnp.asarray([[3], [-8], [-1], [7]], jnp.int8), Integer(bits=4))
    np.testing.assert_array_equal(np.asarray(packed).view(np.uint8), [[0x83], [0x7F]])


@pytest.mark.parametrize("format", FORMATS, ids=format_name)
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-20, 1e37])
def test_numbers_of_any_size_stay_finite(format, size):
    """A row of zeros has scale 1; a scale below what can be divided by is not one; the greatest does not overflow."""
    x = normal(64, 4) * jnp.asarray([size, 1, 1, 1])
    found = quantize(x, format).dequantize()
    assert np.isfinite(found).all()
    if size <= 1e-38:
        np.testing.assert_array_equal(found[:, 0], 0)
    else:
        assert np.abs(found[:, 0] - x[:, 0]).max() <= np.abs(x[:, 0]).max()
    np.testing.assert_array_equal(found[:, 1:], quantize(normal(64, 4), format).dequantize()[:, 1:])


def test_what_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="the group of 32 does not divide 48 inputs; use a group of 24"):
        group_size(48, Integer(bits=4, group=32))
    with pytest.raises(ConfigError, match="7 inputs of 4 bits do not fill whole bytes; make it a multiple of 2"):
        quantize(normal(7, 4), Integer(bits=4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Integer(bits=3), "bits is 3; use 8 or 4"),
        (lambda: Integer(group=0), "group is 0; give a positive number"),
        (lambda: Integer(scale_dtype="float16"), "scale_dtype is 'float16'"),
        (lambda: parse_format("int5"), "'int5' is not a number format; use one of int8, int4, ternary, fp8"),
        (lambda: parse_format("int4:32"), "'int4:32' is not a number format"),
    ],
)
def test_a_format_that_does_not_exist_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("text", ["int8", "int4:g32", "ternary:g64", "fp8", "fp8:g128"])
def test_a_name_says_the_format(text):
    assert format_name(parse_format(text)) == text


def test_the_gradient_goes_straight_through():
    x, slope = normal(32, 8), normal(32, 8, seed=1)
    gradient = jax.grad(lambda x: (fake_quantize(x, Integer(bits=4, group=8), -2) * slope).sum())(x)
    np.testing.assert_array_equal(gradient, slope)


@pytest.mark.parametrize("group", [None, 8])
def test_the_gradient_of_a_learned_step_is_that_of_the_paper(group):
    """By NumPy, LSQ's equations 3 and 5 and its gradient scale; steps so small that some numbers are clipped."""
    format = Integer(bits=4, group=group, scale_dtype="float32")
    x, slope = np.asarray(normal(32, 3)), np.asarray(normal(32, 3, seed=1))
    size = group or 32
    step = np.asarray(step_of(jnp.asarray(x), format)) * 0.6
    dx, ds = jax.grad(lambda x, s: (learned_quantize(x, s, format, -2) * slope).sum(), argnums=(0, 1))(x, step)
    v = x / np.repeat(step, size, axis=0)
    clipped = (v < -8) | (v > 7)
    assert 0 < clipped.mean() < 0.5
    np.testing.assert_array_equal(dx, np.where(clipped, 0, slope))
    by_number = np.where(v < -8, -8, np.where(v > 7, 7, np.round(v) - v)) * slope
    np.testing.assert_allclose(ds, by_number.reshape(-1, size, 3).sum(1) / np.sqrt(size * 7), rtol=1e-4, atol=1e-5)


def test_a_learned_step_is_used_as_it_is_stored():
    x, format = normal(32, 8), Integer(bits=4, group=8)
    step = step_of(x, format) * 0.8
    trained = jax.jit(learned_quantize, static_argnums=(2, 3))(x, step, format, -2)
    np.testing.assert_array_equal(trained, quantize(x, format, scale=step.astype("bfloat16")).dequantize())


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_of_integers_is_that_of_training_to_the_bit(dtype, rows):
    """Of as many inputs as float32 adds up exactly; and the values that both stand for, but for rounding."""
    x, w, int8 = normal(rows, 1024).astype(dtype), normal(1024, 24, seed=1), Integer(bits=8)
    found = jax.jit(lambda x, w: quantized_product(x, quantize(w, int8), int8))(x, w)
    trained = jax.jit(fake_quantized_product, static_argnums=(2, 3))(x, w, int8, int8)
    np.testing.assert_array_equal(found, trained)
    wanted = np.asarray(fake_quantize(x.astype("float32"), int8, -1)) @ np.asarray(fake_quantize(w, int8, -2))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_product_of_float8_is_that_of_its_values():
    x, w, float8 = normal(16, 64), normal(64, 24, seed=1), Float8()
    wanted = fake_quantize(x, float8, -1) @ fake_quantize(w, float8, -2)
    for found in (
        quantized_product(x, quantize(w, float8), float8),
        fake_quantized_product(x, w, float8, float8),
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)


def test_gradients_of_a_product_of_levels_are_those_of_its_values():
    x, w, slope, int8 = normal(16, 64), normal(64, 24, seed=1), normal(16, 24, seed=2), Integer(bits=8)
    found = jax.grad(lambda x, w: (fake_quantized_product(x, w, int8, int8) * slope).sum(), argnums=(0, 1))(x, w)
    wanted = jax.grad(
        lambda x, w: ((fake_quantize(x, int8, -1) @ fake_quantize(w, int8, -2)) * slope).sum(), argnums=(0, 1)
    )(x, w)
    for mine, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        (None, Integer(bits=8)),
        (Integer(bits=8), None),
        (Integer(bits=8), Float8()),
        (Integer(bits=4), Integer(bits=8)),
        (Integer(bits=8, group=32), Integer(bits=8)),
    ],
)
def test_products_of_unlike_or_grouped_numbers_are_those_of_floats(weights, activations):
    assert not multiplies_quantized(weights, activations)
    assert multiplies_quantized(Integer(bits=8), Integer(bits=8))
