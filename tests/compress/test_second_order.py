"""GPTQ and SparseGPT against their own definition, row by row with an explicit inverse, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.compress.layerwise.calibration import matrix_errors
from efftrain.compress.layerwise.second_order import (
    BLOCK,
    DAMPING,
    FactoredHessian,
    compensated,
    gptq,
    inverse_factor,
    sparse_gpt,
)
from efftrain.errors import ConfigError
from efftrain.ops.masks import SemiStructured, Unstructured
from efftrain.ops.number_formats import Integer
from efftrain.ops.quantize import quantize

INT4 = Integer(bits=4, group=16, scale_dtype="float32")


def problem(d: int, f: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and the Hessian of correlated inputs of unequal size."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * d, d)) @ rng.normal(size=(d, d)) * rng.uniform(0.1, 2, d)
    return rng.normal(size=(d, f)).astype(np.float32), (x.T @ x).astype(np.float32)


def by_definition(w: np.ndarray, hessian: np.ndarray, project) -> np.ndarray:
    """Optimal brain surgery: after each row, the others move by the inverse of the Hessian of what is left."""
    d, w, out = len(w), w.astype(np.float64).copy(), np.zeros(w.shape)
    hessian = hessian.astype(np.float64) + DAMPING * np.mean(np.diag(hessian)) * np.eye(d)
    for i in range(d):
        inverse = np.linalg.inv(hessian[i:, i:])
        out[i] = project(w[i], i)
        w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - out[i])
    return out


@pytest.mark.parametrize("d", [24, BLOCK + 32, BLOCK + 3])
def test_rows_are_made_up_for_as_the_definition_says(d):
    """To halves, in one block of rows and in several."""
    w, hessian = problem(d, 5)

    def halves(row, i):
        return jnp.round(row * 2) / 2

    with jax.enable_x64(True):  # in float32 a tie falls to the other side, and what follows differs
        exact = jnp.asarray(w, jnp.float64), jnp.asarray(hessian, jnp.float64)
        np.testing.assert_array_equal(
            compensated(exact[0], inverse_factor(exact[1])[0], halves),
            wanted := by_definition(w, hessian, lambda row, i: np.round(row * 2) / 2),
        )
    found = compensated(jnp.asarray(w), inverse_factor(jnp.asarray(hessian))[0], halves)
    x = np.linalg.cholesky(hessian.astype(np.float64) + 1e-3 * np.eye(d)).T

    def error(values):
        return np.linalg.norm(x @ (np.asarray(values, np.float64) - w))

    assert error(found) == pytest.approx(error(wanted), rel=0.05)
    assert error(found) < 0.9 * error(np.round(w * 2) / 2)


def test_gptq_changes_outputs_less_than_rounding():
    w, hessian = problem(64, 32)
    nearest, better = (
        quantize(jnp.asarray(w), INT4),
        gptq(jnp.asarray(w), FactoredHessian.of(jnp.asarray(hessian)), INT4),
    )
    errors = [matrix_errors(q.dequantize(), jnp.asarray(w), jnp.asarray(hessian)).outputs for q in (better, nearest)]
    assert errors[0] < 0.7 * errors[1]
    np.testing.assert_array_equal(better.scale, nearest.scale)
    assert better.levels().min() >= -8


def test_with_independent_equal_inputs_gptq_is_rounding():
    w, _ = problem(32, 8)
    found, nearest = gptq(jnp.asarray(w), FactoredHessian.of(jnp.eye(32)), INT4), quantize(jnp.asarray(w), INT4)
    # But for ties: the greatest of a group stands half a step behind the last level.
    np.testing.assert_allclose(np.abs(found.dequantize() - w), np.abs(nearest.dequantize() - w), atol=1e-5)


def test_an_input_that_is_never_used_is_rounded():
    w, hessian = problem(32, 8)
    hessian[3], hessian[:, 3] = 0, 0
    found = gptq(jnp.asarray(w), FactoredHessian.of(jnp.asarray(hessian)), INT4)
    nearest = quantize(jnp.asarray(w), INT4).dequantize()
    np.testing.assert_allclose(np.abs(found.dequantize() - w)[3], np.abs(nearest - w)[3], atol=1e-5)
    assert np.isfinite(found.dequantize()).all()


def test_too_little_text_is_damped_until_it_works():
    """A Hessian of rank one, and one that rounding has made indefinite; how much was needed is said."""
    x = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32) * 1e3
    broken = x.T @ x - 0.05 * np.eye(32, dtype=np.float32) * np.mean(x**2)
    for hessian, needed in ((x.T @ x, DAMPING), (broken, 10 * DAMPING)):
        factor, damping = inverse_factor(jnp.asarray(hessian, jnp.float32))
        assert np.isfinite(factor).all()
        assert damping == pytest.approx(needed)
        damped = hessian.astype(np.float64) + needed * np.mean(np.diag(hessian)) * np.eye(32)
        np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped), rtol=1e-2, atol=1e-9)
        assert FactoredHessian.of(hessian).damping == damping
        assert sparse_gpt(jnp.eye(32), hessian, Unstructured(sparsity=0.5))[1] == damping
    with pytest.raises(ConfigError, match="are not finite; use a model with finite activations"):
        inverse_factor(jnp.full((4, 4), jnp.nan))


def pruned_by_definition(w: np.ndarray, hessian: np.ndarray, n: int, m: int) -> np.ndarray:
    """In every group of m rows, those of which going costs least, given what was pruned before, for each column."""
    d, w, out = len(w), w.astype(np.float64).copy(), np.zeros(w.shape)
    hessian = hessian.astype(np.float64) + DAMPING * np.mean(np.diag(hessian)) * np.eye(d)
    # U_jj^2 is what the row alone has left once all rows before it are settled.
    left = np.array([np.linalg.inv(hessian[i:, i:])[0, 0] for i in range(d)])
    for start in range(0, d, m):
        cost = w[start : start + m] ** 2 / left[start : start + m, None]
        gone = np.argsort(cost, axis=0, kind="stable")[: m - n]
        keep = np.ones(cost.shape, bool)
        np.put_along_axis(keep, gone, False, axis=0)
        for i in range(start, start + m):
            inverse = np.linalg.inv(hessian[i:, i:])
            out[i] = np.where(keep[i - start], w[i], 0)
            w[i:] -= np.outer(inverse[:, 0] / inverse[0, 0], w[i] - out[i])
    return out


@pytest.mark.parametrize("d", [24, BLOCK + 32])
def test_sparse_gpt_is_what_the_definition_says(d):
    w, hessian = problem(d, 5)
    with jax.enable_x64(True):
        found, _ = sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), SemiStructured(n=2, m=4))
    wanted = pruned_by_definition(w, hessian, 2, 4)
    same = (np.asarray(found) == 0) == (wanted == 0)
    assert same.mean() > 0.99  # float32 within; two costs may change places
    groups = np.asarray(found).reshape(-1, 4, 5)
    assert (np.count_nonzero(groups, axis=1) == 2).all()
    columns = same.all(0)
    assert columns.any()
    np.testing.assert_allclose(np.asarray(found)[:, columns], wanted[:, columns], atol=0.02)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_sparse_gpt_prunes_exactly_its_share_and_as_much_of_every_block_of_rows(sparsity):
    w, hessian = problem(3 * BLOCK, 5)
    found = np.asarray(sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), Unstructured(sparsity=sparsity))[0])
    assert np.count_nonzero(found) == round((1 - sparsity) * found.size)
    for block in found.reshape(3, -1):
        assert abs(np.count_nonzero(block) - (1 - sparsity) * block.size) <= 1


def test_gptq_leaves_zeros_of_a_pruned_matrix():
    w, hessian = problem(64, 16)
    w = np.where(np.random.default_rng(1).random(w.shape) < 0.5, w, 0)
    found = gptq(jnp.asarray(w), FactoredHessian.of(jnp.asarray(hessian)), INT4)
    assert not np.asarray(found.dequantize())[w == 0].any()


def test_sparse_gpt_rounds_what_stays_in_the_same_pass():
    w, hessian = problem(64, 32)
    found, _ = sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), Unstructured(sparsity=0.5), INT4)
    stored = quantize(found, INT4, scale=quantize(jnp.asarray(w), INT4).scale)
    np.testing.assert_allclose(stored.dequantize(), found, atol=1e-6)
    assert np.count_nonzero(stored.levels()) <= found.size // 2
    apart, _ = sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), Unstructured(sparsity=0.5))
    rounded = quantize(apart, INT4, scale=stored.scale).dequantize()
    errors = [matrix_errors(jnp.asarray(a), jnp.asarray(w), jnp.asarray(hessian)).outputs for a in (found, rounded)]
    assert errors[0] < errors[1]


def test_what_reads_an_input_that_is_never_used_goes_first():
    w, hessian = problem(32, 8)
    hessian[3], hessian[:, 3] = 0, 0
    found = np.asarray(sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), Unstructured(sparsity=0.5))[0])
    assert not found[3].any()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_a_prime_number_of_inputs_is_pruned_as_well_as_a_whole_block(sparsity):
    """131 inputs and 128 of the same kind: the error hardly differs, and the share is exact."""
    errors = {}
    for d in (BLOCK, 131):
        w, hessian = problem(d, 32, seed=1)
        found, _ = sparse_gpt(jnp.asarray(w), jnp.asarray(hessian), Unstructured(sparsity=sparsity))
        assert np.count_nonzero(found) == round((1 - sparsity) * found.size)
        errors[d] = matrix_errors(found, jnp.asarray(w), jnp.asarray(hessian)).outputs
    assert errors[131] < 1.1 * errors[BLOCK]
