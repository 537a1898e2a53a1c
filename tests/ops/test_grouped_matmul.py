"""Every way of computing groups, against one SwiGLU an assignment in plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops import grouped_matmul
from efftrain.ops.grouped_matmul import block_sizes, dispatch_layout, grouped_swiglu
from efftrain.ops.grouped_rows import from_rows, to_rows

TOKENS, CHOICES, GROUPS, D, F = 40, 2, 5, 8, 6
CASES = {
    "even": lambda rng: rng.integers(0, GROUPS, (TOKENS, CHOICES)),
    "all to one": lambda rng: np.full((TOKENS, CHOICES), 3),
    "empty groups": lambda rng: rng.choice([0, 4], (TOKENS, CHOICES)),
    "some to none": lambda rng: rng.integers(0, GROUPS + 1, (TOKENS, CHOICES)),
}


@pytest.fixture(params=[(256, 64), (8, 3)], ids=["one block", "many blocks"], autouse=True)
def _blocks(request, monkeypatch):
    """Blocks larger than any group, and such that groups take whole ones and a rest."""
    monkeypatch.setattr(grouped_matmul, "block_sizes", lambda n_assignments, n_groups: request.param)


@pytest.fixture(params=CASES)
def case(request):
    rng = np.random.default_rng(0)
    shapes = [(TOKENS, D), (GROUPS, D, F), (GROUPS, D, F), (GROUPS, F, D), (TOKENS, CHOICES)]
    return [(rng.normal(size=shape) * 0.5).astype(np.float32) for shape in shapes], CASES[request.param](rng)


def direct(x, gate, up, down, gates, groups):
    belongs = groups < GROUPS
    groups = np.minimum(groups, GROUPS - 1)
    hidden = jax.nn.silu(jnp.einsum("nd,nkdf->nkf", x, gate[groups])) * jnp.einsum("nd,nkdf->nkf", x, up[groups])
    return jnp.einsum("nkf,nkfd,nk->nd", hidden, down[groups], gates * belongs)


def through_rows(x, gate, up, down, gates, groups, dispatch):
    where = dispatch_layout(jnp.asarray(groups, jnp.int32), GROUPS, dispatch, capacity=TOKENS * CHOICES)
    return from_rows(grouped_swiglu(to_rows(x, where), gate, up, down, where, dispatch), gates, where)


@pytest.mark.parametrize("dispatch", ["each", "capacity", "blocks", "megablox", "ragged"])
def test_rows_meet_the_matrices_of_their_group(case, dispatch):
    arrays, groups = case

    def results(function, *more):
        def weighted(*arrays):
            out = function(*arrays, groups, *more)
            return jnp.sin(out).sum(), out

        (_, out), gradients = jax.jit(jax.value_and_grad(weighted, range(5), has_aux=True))(*arrays)
        return out, *gradients

    names = ("output", "x", "gate", "up", "down", "gates")
    found, expected = results(through_rows, dispatch), results(direct)
    for name, a, b in zip(names, found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("n_assignments", "sizes"), [(16, (32, 8)), (256, (64, 16)), (1024, (256, 64)), (65_536, (256, 64))]
)
def test_groups_of_few_rows_take_small_blocks(n_assignments, sizes):
    assert block_sizes(n_assignments, 8) == sizes
