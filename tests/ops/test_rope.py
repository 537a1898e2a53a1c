"""Rotary embedding against rotation of complex numbers, and against the layout of Hugging Face."""

import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.rope import apply_rope, rope_angles, rope_frequencies

POSITIONS = np.array([[0, 1, 2, 17, 4000], [5, 5, 0, 1, 2]])


def draw(dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 8)), dtype)


def rotate(x, positions=POSITIONS, theta=10_000.0):
    return apply_rope(x, *rope_angles(jnp.asarray(positions), rope_frequencies(x.shape[-1], theta)))


@pytest.mark.parametrize("theta", [10_000.0, 500.0])
def test_each_pair_turns_by_position_times_frequency(theta):
    x = draw()
    x64 = np.asarray(x, np.float64)
    angles = POSITIONS[..., None] * theta ** (-2 * np.arange(4) / 8)
    turned = (x64[..., :4] + 1j * x64[..., 4:]) * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(rotate(x, theta=theta), np.concatenate([turned.real, turned.imag], -1), atol=2e-3)
    near = POSITIONS < 100  # the angle of position 4000 is known to float32's 1e-4 only
    truth = np.concatenate([turned.real, turned.imag], -1)[near]
    np.testing.assert_allclose(rotate(x, theta=theta)[near], truth, atol=1e-5)


def test_the_layout_is_that_of_hugging_face():
    """``x * cos + rotate_half(x) * sin`` with the angles repeated, as in transformers' ``apply_rotary_pos_emb``."""
    x, positions = draw(), POSITIONS % 50
    frequencies = 1 / 10_000 ** (np.arange(0, 8, 2) / 8)
    angles = np.tile(positions[..., None] * frequencies, 2)[:, :, None]
    rotate_half = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    np.testing.assert_allclose(rotate(x, positions), x * np.cos(angles) + rotate_half * np.sin(angles), atol=1e-5)


def test_scores_depend_on_the_distance_only():
    query, key = draw(), draw()[:, ::-1]
    far = POSITIONS % 50 + 300
    scores = (rotate(query, POSITIONS % 50) * rotate(key, POSITIONS % 50 + 9)).sum(-1)
    np.testing.assert_allclose((rotate(query, far) * rotate(key, far + 9)).sum(-1), scores, atol=1e-4)
    assert np.abs((rotate(query, far) * rotate(key, far + 8)).sum(-1) - scores).max() > 0.1


def test_position_zero_and_length_are_kept():
    x = draw()
    np.testing.assert_array_equal(rotate(x)[0, 0], x[0, 0])
    np.testing.assert_allclose(jnp.linalg.norm(rotate(x), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)


def test_bfloat16_is_rotated_in_float32():
    """A bfloat16 angle of position 4000 would be off by whole turns."""
    x = draw("bfloat16")
    out = rotate(x)
    assert out.dtype == jnp.bfloat16
    exact = rotate(x.astype(jnp.float32))
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
