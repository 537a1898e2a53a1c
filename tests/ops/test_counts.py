"""Counts over 2^31 against Python's integers, and the ranking of several arrays against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.counts import WEIGHTS, allocate, as_count, at_least, carried, total
from efftrain.ops.joint_ranking import keep_highest_together
from efftrain.ops.masks import Unstructured, count_zeros, kept_units, kept_units_together, zeros_per_row

LARGE = 2**31 - 1


def number(count) -> int:
    assert count.dtype == jnp.int32
    assert (np.asarray(count)[1:] < 2048).all()
    return int(np.asarray(count) @ WEIGHTS)


@pytest.mark.parametrize("n", [0, 1, 2047, 2048, LARGE, 2**31, 2**40 + 12345, 70_000_000_000])
def test_a_count_holds_what_an_int32_cannot(n):
    assert number(as_count(n)) == n
    rounded = np.float32(n)
    assert number(as_count(jnp.asarray(rounded))) == int(rounded)
    assert number(carried(as_count(n + 5) - as_count(3))) == n + 2
    order = [bool(at_least(as_count(n + 1), as_count(m))) for m in (n, n + 1, n + 2)]
    assert order == [True, True, False]


def test_sums_carry():
    numbers = np.random.default_rng(0).integers(LARGE - 5000, LARGE, 20_000, dtype=np.int32)
    assert number(jax.jit(total)(numbers)) == numbers.sum(dtype=np.int64) > 2**44


def test_what_is_left_goes_to_the_first():
    wanted = jnp.array([LARGE, LARGE, 0, LARGE, 7], jnp.int32)
    for n in (0, 5, LARGE, 2 * LARGE + 11, 3 * LARGE + 7, 4 * LARGE):
        left, got = allocate(as_count(n), wanted)
        before = np.concatenate([[0], np.cumsum(np.asarray(wanted, np.int64))[:-1]])
        assert got.tolist() == np.clip(n - before, 0, np.asarray(wanted)).tolist()
        assert number(left) == max(n - 3 * LARGE - 7, 0)


@pytest.mark.parametrize("n_keep", [0, 1, 57, 100, 159, 160])
def test_the_highest_of_several_arrays_are_those_of_a_sort(n_keep):
    """With ties, zeros of both signs and infinities."""
    rng = np.random.default_rng(0)
    shapes = [(2, 1, 30), (4, 1, 20), (1, 1, 20)]
    arrays = [rng.integers(-2, 3, shape).astype(np.float32) * np.float32(0.3) for shape in shapes]
    arrays[0][0, 0, :3], arrays[1][1, 0, :2] = np.inf, -np.inf
    arrays[2][0, 0, ::2] *= -0.0
    masks = jax.jit(keep_highest_together)([jnp.asarray(a) for a in arrays], as_count(n_keep))
    flat = np.concatenate([a.reshape(-1) for a in arrays])
    want = np.zeros(len(flat), bool)
    want[sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:n_keep]] = True
    np.testing.assert_array_equal(np.concatenate([np.asarray(m).reshape(-1) for m in masks]), want)


def test_kept_units_together_are_those_of_one_group_where_both_can_be_counted():
    half = Unstructured(sparsity=0.55)
    for units in (7, 1_000_003, LARGE - 200):
        for share in (0.0, 0.3, 0.9, 1.0):
            assert number(kept_units_together(half, units, share)) == int(kept_units(half, units, share))
    assert number(kept_units_together(half, 70_000_000_000, 1.0)) == round(0.45 * 70_000_000_000)
    assert number(kept_units_together(half, 70_000_000_000, jnp.float32(0.5))) == pytest.approx(50.75e9, rel=1e-6)


def test_zeros_are_counted_row_by_row():
    """Of an array of a device; each row's number is an int32, their sum is Python's."""
    w = np.random.default_rng(0).integers(0, 3, (3, 5, 7)).astype(np.float32)
    assert count_zeros(jnp.asarray(w)) == (w == 0).sum()
    found = jax.eval_shape(zeros_per_row, jax.ShapeDtypeStruct((61, 256, 4096, 1 << 13), jnp.float32))
    assert (found.shape, found.dtype) == ((61, 256, 4096), jnp.int32)  # no sum over more than a row
