"""GPTQ against its own definition, row by row with an explicit inverse, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.compress.observe import relative_error
from efftrain.compress.second_order import BLOCK, DAMPING, compensated, gptq, inverse_factor
from efftrain.errors import ConfigError
from efftrain.ops.number_formats import Integer
from efftrain.ops.quantize import quantize

INT4 = Integer(bits=4, group=16, scale_dtype="float32")


def problem(d: int, f: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the Gram matrix of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d)) * rng.uniform(0.1, 2, d)
    return rng.normal(size=(d, f)).astype(np.float32), (x.T @ x).astype(np.float32)


def by_definition(w: np.ndarray, gram: np.ndarray, project) -> np.ndarray:
    """Optimal brain surgery: after each row, the others move by the inverse of the Gram matrix of what is left."""
    d, w, out = len(w), w.astype(np.float64).copy(), np.zeros(w.shape)
    gram = gram.astype(np.float64) + DAMPING * np.mean(np.diag(gram)) * np.eye(d)
    for i in range(d):
        inverse = np.linalg.inv(gram[i:, i:])
        out[i] = project(w[i], i)
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - out[i])
    return out


@pytest.mark.parametrize("d", [24, BLOCK + 32])
def test_rows_are_made_up_for_as_the_definition_says(d):
    """To halves, in one block of rows and in several."""
    w, gram = problem(d, 5)

    def halves(row, i):
        return jnp.round(row * 2) / 2

    with jax.enable_x64(True):  # in float32 a tie falls to the other side, and what follows differs
        exact = jnp.asarray(w, jnp.float64), jnp.asarray(gram, jnp.float64)
        np.testing.assert_array_equal(
            compensated(exact[0], inverse_factor(exact[1]), halves),
            wanted := by_definition(w, gram, lambda row, i: np.round(row * 2) / 2),
        )
    found = compensated(jnp.asarray(w), inverse_factor(jnp.asarray(gram)), halves)
    x = np.linalg.cholesky(gram.astype(np.float64) + 1e-3 * np.eye(d)).T

    def error(values):
        return np.linalg.norm(x @ (np.asarray(values, np.float64) - w))

    assert error(found) == pytest.approx(error(wanted), rel=0.05)
    assert error(found) < 0.9 * error(np.round(w * 2) / 2)


def test_gptq_changes_outputs_less_than_rounding():
    w, gram = problem(64, 32)
    nearest, better = quantize(jnp.asarray(w), INT4), gptq(jnp.asarray(w), jnp.asarray(gram), INT4)
    errors = [relative_error(q.dequantize() - w, jnp.asarray(w), jnp.asarray(gram)) for q in (better, nearest)]
    assert errors[0] < 0.7 * errors[1]
    np.testing.assert_array_equal(better.scale, nearest.scale)
    assert better.levels().min() >= -8


def test_with_independent_equal_inputs_gptq_is_rounding():
    w, _ = problem(32, 8)
    found, nearest = gptq(jnp.asarray(w), jnp.eye(32), INT4), quantize(jnp.asarray(w), INT4)
    # But for ties: the greatest of a group stands half a step behind the last level.
    np.testing.assert_allclose(np.abs(found.dequantize() - w), np.abs(nearest.dequantize() - w), atol=1e-5)


def test_an_input_that_is_never_used_is_rounded():
    w, gram = problem(32, 8)
    gram[3], gram[:, 3] = 0, 0
    found = gptq(jnp.asarray(w), jnp.asarray(gram), INT4)
    nearest = quantize(jnp.asarray(w), INT4).dequantize()
    np.testing.assert_allclose(np.abs(found.dequantize() - w)[3], np.abs(nearest - w)[3], atol=1e-5)
    assert np.isfinite(found.dequantize()).all()


def test_too_little_text_is_damped_until_it_works():
    """A Gram matrix of rank one, and one that rounding has made indefinite."""
    x = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32) * 1e3
    for gram in (x.T @ x, x.T @ x - 0.05 * np.eye(32, dtype=np.float32) * np.mean(x**2)):
        factor = inverse_factor(jnp.asarray(gram, jnp.float32))
        assert np.isfinite(factor).all()
    with pytest.raises(ConfigError, match="are not finite; calibrate a model that works"):
        inverse_factor(jnp.full((4, 4), jnp.nan))
