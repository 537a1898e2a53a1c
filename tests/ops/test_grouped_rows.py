"""Where assignments stand, what is dropped, and that rows come back to their tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.grouped_rows import from_rows, group_layout, to_rows


def test_a_full_group_drops_the_later_tokens():
    groups = jnp.zeros((6, 1), jnp.int32)
    where = group_layout(groups, 2, capacity=4)
    assert where.row_nk[:, 0].tolist() == [0, 1, 2, 3, 8, 8]
    assert where.sizes_e.tolist() == [6, 0]
    x = jnp.arange(6.0)[:, None] + 1
    out = from_rows(to_rows(x, where), jnp.ones((6, 1)), where)
    assert out[:, 0].tolist() == [1, 2, 3, 4, 0, 0]
    gradient = jax.grad(lambda x: from_rows(to_rows(x, where), jnp.ones((6, 1)), where).sum())(x)
    assert gradient[:, 0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("capacity", [None, 7])
@pytest.mark.parametrize("seed", range(4))
def test_rows_stand_group_after_group_in_the_order_of_the_tokens(seed, capacity):
    """Against a loop; some assignments belong to no group, and have no row."""
    n_groups = 5
    groups = np.random.default_rng(seed).integers(0, n_groups + 1, (20, 2))
    where = group_layout(jnp.asarray(groups), n_groups, capacity=capacity, slack=3)
    expected = np.full(n_groups * capacity if capacity else groups.size + 3, -1)
    for group in range(n_groups):
        found = np.flatnonzero(groups.ravel() == group)
        at = group * capacity if capacity else np.sum(groups.ravel() < group)
        found = found[:capacity]
        expected[at : at + len(found)] = found
    assert where.assignment_r.tolist() == expected.tolist()
    assert where.sizes_e.tolist() == np.bincount(groups.ravel(), minlength=n_groups + 1)[:-1].tolist()
    rows = np.asarray(where.row_nk).ravel()
    placed = rows < where.n_rows
    assert np.array_equal(expected[rows[placed]], np.flatnonzero(placed))
    assert placed.sum() == (expected >= 0).sum()


def test_rows_come_back_weighted_and_summed_over_the_choices():
    rng = np.random.default_rng(0)
    groups, x, gates = rng.integers(0, 4, (9, 2)), rng.normal(size=(9, 3)), rng.random((9, 2))
    where = group_layout(jnp.asarray(groups), 4)
    back = from_rows(to_rows(jnp.asarray(x), where), jnp.asarray(gates), where)
    np.testing.assert_allclose(back, x * gates.sum(1, keepdims=True), rtol=1e-6)
