"""Every way of sending rows to groups, against one product a group in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.grouped_matmul import from_rows, grouped_matmul, layout, to_rows

TOKENS, CHOICES, GROUPS, D, F = 40, 2, 5, 8, 6
WAYS = [
    ("capacity", {"capacity": TOKENS * CHOICES}),
    ("padded", {"block": 7}),
    ("padded", {"block": 64}),
    ("ragged", {}),
]
CASES = {
    "even": lambda rng: rng.integers(0, GROUPS, (TOKENS, CHOICES)),
    "all to one": lambda rng: np.full((TOKENS, CHOICES), 3),
    "empty groups": lambda rng: rng.choice([0, 4], (TOKENS, CHOICES)),
}


def reference(x, w, groups, gates):
    y = np.zeros((TOKENS, F), np.float64)
    for n in range(TOKENS):
        for k in range(CHOICES):
            y[n] += gates[n, k] * (np.float64(x[n]) @ np.float64(w[groups[n, k]]))
    return y


def through_rows(x, w, gates, groups, dispatch, **options):
    where = layout(jnp.asarray(groups, jnp.int32), GROUPS, dispatch, **options)
    return from_rows(grouped_matmul(to_rows(x, where), w, where, dispatch), gates, where)


@pytest.fixture(params=CASES)
def case(request):
    rng = np.random.default_rng(0)
    groups = CASES[request.param](rng)
    x, w = rng.normal(size=(TOKENS, D)).astype(np.float32), rng.normal(size=(GROUPS, D, F)).astype(np.float32)
    return x, w, groups, rng.random((TOKENS, CHOICES), np.float32)


@pytest.mark.parametrize(("dispatch", "options"), WAYS)
def test_rows_meet_the_matrix_of_their_group(case, dispatch, options):
    x, w, groups, gates = case
    found = jax.jit(lambda x, w, g: through_rows(x, w, g, groups, dispatch, **options))(x, w, gates)
    np.testing.assert_allclose(found, reference(x, w, groups, gates), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dispatch", "options"), WAYS)
def test_gradients_are_those_of_one_product_a_group(case, dispatch, options):
    x, w, groups, gates = case

    def direct(x, w, gates):
        return jnp.sin(jnp.einsum("nd,nkdf,nk->nf", x, w[groups], gates)).sum()

    def ours(x, w, gates):
        return jnp.sin(through_rows(x, w, gates, groups, dispatch, **options)).sum()

    expected = jax.jit(jax.grad(direct, argnums=(0, 1, 2)))(x, w, gates)
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2)))(x, w, gates)
    for name, a, b in zip(("x", "w", "gates"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


def test_a_full_group_drops_the_later_tokens():
    groups = jnp.zeros((6, 1), jnp.int32)
    where = layout(groups, 2, "capacity", capacity=4)
    assert where.row_nk[:, 0].tolist() == [0, 1, 2, 3, 8, 8]
    assert where.sizes_e.tolist() == [6, 0]
    x = jnp.arange(6.0)[:, None] + 1
    out = from_rows(to_rows(x, where), jnp.ones((6, 1)), where)
    assert out[:, 0].tolist() == [1, 2, 3, 4, 0, 0]
    gradient = jax.grad(lambda x: from_rows(to_rows(x, where), jnp.ones((6, 1)), where).sum())(x)
    assert gradient[:, 0].tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_padded_groups_never_share_a_block(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, GROUPS, (TOKENS, CHOICES)) * rng.integers(0, 2, (TOKENS, 1))
    where = layout(jnp.asarray(groups, jnp.int32), GROUPS, "padded", block=8)
    rows = np.asarray(where.row_nk).ravel()
    assert len({*rows.tolist()}) == TOKENS * CHOICES
    assert np.array_equal(np.asarray(where.group_b)[rows // 8], groups.ravel())
    assert np.array_equal(np.asarray(where.assignment_r)[rows], np.arange(TOKENS * CHOICES))
    assert np.bincount(groups.ravel(), minlength=GROUPS).tolist() == where.sizes_e.tolist()
