"""Decisions between nearly equal scores are float32 on accelerators too: asked for in the program that XLA gets."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efftrain.models.depth.depth_router import Router
from efftrain.models.depth.early_exit import ExitProbe
from efftrain.models.moe import MoE

X_BTD = jnp.zeros((2, 5, 12))
PROBE = ExitProbe(jnp.zeros((3, 12)), jnp.zeros(3))


def depth_router(call):
    router = Router(12, "predictor", token_fraction=0.5, eps=1e-5, rngs=nnx.Rngs(0))
    graph, state = nnx.split(router)
    return (lambda state, x: call(nnx.merge(graph, state), x)), state


def experts():
    graph, state = nnx.split(MoE(n_experts=7, d_expert=4).build(12, n_layers=1, dtype="bfloat16", rngs=nnx.Rngs(0)))
    return (lambda state, x: nnx.merge(graph, state)(x)[0].sum()), state


def products(function, *arguments):
    """The dense products of a program, as text."""
    text = jax.jit(function).lower(*arguments).as_text()
    return [line for line in text.splitlines() if "dot_general" in line]


def highest(product):
    return re.search(r"precision = \[HIGHEST, HIGHEST\]", product) is not None


@pytest.mark.parametrize(
    ("call", "n_products"), [(lambda router, x: router(x), 1), (lambda router, x: router.predict(x), 2)]
)
def test_routers_of_depth(call, n_products):
    function, state = depth_router(call)
    found = products(function, state, X_BTD)
    assert len(found) == n_products
    assert all(map(highest, found))


def test_routers_of_experts_forward_and_backward():
    """The products with the router's matrix (12, 7), and no others: those of the experts stay bfloat16."""
    function, state = experts()
    routers = [
        line
        for line in products(jax.grad(function, allow_int=True), state, X_BTD)
        if re.search(r"<(12x7|10x7)xf32>", line)
    ]
    assert len(routers) >= 2
    assert all(map(highest, routers))


def test_probes_that_decide_on_exits():
    found = products(lambda x: PROBE(x, 2), X_BTD)
    assert len(found) == 1
    assert highest(found[0])
