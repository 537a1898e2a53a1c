"""Experts spread over devices: the same numbers as on one, the rows that move, what is dropped, what is refused."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.compiled.hlo import ProgramText
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.train.objectives.objective import next_token_loss

ROWS, LENGTH, VOCAB = 8, 16, 32
DENSE = llama(vocab_size=VOCAB, d_model=16, n_layers=2, n_heads=4, d_ff=24, max_length=LENGTH)
ROUTED = MoE(n_experts=8, top_k=2, d_expert=12, n_shared=1, auxiliary_loss=0.01, z_loss=1e-3)
MESHES = {
    "expert8": MeshConfig(fsdp=1, expert=8),
    "fsdp2-expert4": MeshConfig(fsdp=2, expert=4),
    "fsdp2-expert2-tensor2": MeshConfig(fsdp=2, expert=2, tensor=2),
    "replica2-expert2-context2": MeshConfig(replica=2, fsdp=1, expert=2, context=2),
    "fsdp4-tensor2": MeshConfig(fsdp=4, tensor=2),
}


def model_config(mlp: MoE):
    return replace(DENSE, pattern=(replace(DENSE.pattern[0], mlp=mlp),))


def batch():
    """Four rows of padding alone, and four that end with some."""
    rows = tiny.rows(np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32))
    there = np.arange(LENGTH) < np.array([0, 0, 0, 0, 16, 16, 11, 3])[:, None]
    return {name: np.where(there, a, 0).astype(a.dtype) for name, a in rows.items()}


VALID = 16 + 16 + 11 + 3


def compiled_on(mlp: MoE, mesh_config: MeshConfig):
    """The gradient of the loss on a mesh, compiled, with its arguments."""
    graph, params, rest = nnx.split(Decoder(model_config(mlp), rngs=nnx.Rngs(0)), nnx.Param, ...)
    mesh = make_mesh(mesh_config, jax.devices()[: 1 if mesh_config == MeshConfig() else 8])

    def loss(params):
        total, count, metrics = next_token_loss(nnx.merge(graph, params, rest), batch(), jax.random.key(0))
        return total / count, metrics

    with use(mesh):
        shardings = state_shardings(params, mesh)
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=(shardings,))
        return run.lower(params).compile(), jax.device_put(params, shardings)


def results(mlp: MoE, mesh_config: MeshConfig):
    program, params = compiled_on(mlp, mesh_config)
    (loss, metrics), gradients = program(params)
    return float(loss), jax.device_get(metrics), jax.device_get(gradients)


@cache
def reference():
    return results(replace(ROUTED, dispatch="reference"), MeshConfig())


@pytest.mark.parametrize(
    ("mesh", "dispatch"),
    [*((mesh, "blocks") for mesh in MESHES), ("fsdp2-expert4", "capacity"), ("fsdp2-expert2-tensor2", "ragged")],
)
def test_experts_on_a_mesh_are_the_reference_on_one_device(mesh, dispatch):
    loss, metrics, gradients = results(replace(ROUTED, dispatch=dispatch, capacity_factor=8.0), MESHES[mesh])
    true_loss, true_metrics, true_gradients = reference()
    assert loss == pytest.approx(true_loss, rel=1e-6)
    np.testing.assert_array_equal(metrics["statistics"][0]["loads"], true_metrics["statistics"][0]["loads"])
    assert metrics["statistics"][0]["loads"].sum(-1).tolist() == [2 * VALID] * 2
    assert [float(v) for v in metrics["moe/dropped"]] == [0, 4 * VALID]
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(true_gradients), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


def test_rows_move_by_all_to_all_and_tokens_are_not_gathered():
    program, _ = compiled_on(replace(ROUTED, dispatch="blocks", exchange_factor=1.0), MeshConfig(fsdp=1, expert=8))
    text = ProgramText(program.as_text())
    kinds = {c.kind for c in text.collectives}
    assert "all-to-all" in kinds
    tokens = ROWS * LENGTH * 16 * 4
    assert all(c.size < tokens for c in text.collectives if c.kind == "all-gather")


def test_rows_beyond_the_exchange_are_dropped_and_counted():
    full = results(replace(ROUTED, exchange_factor=8.0), MeshConfig(fsdp=1, expert=8))
    assert full[1]["moe/dropped"][0] == 0
    loss, metrics, _ = results(replace(ROUTED, exchange_factor=0.5), MeshConfig(fsdp=1, expert=8))
    dropped, assignments = metrics["moe/dropped"]
    assert assignments == 2 * VALID * 2
    # Each device that has tokens sends each other at most ceil(0.5 * 32 / 8) = 2 rows of its 16 tokens' 32.
    assert assignments > dropped >= assignments - 2 * 4 * 8 * 2
    assert loss != full[0]


@pytest.mark.parametrize("mesh", ["one", "fsdp2-expert4", "fsdp2-expert2-tensor2"])
def test_saliency_is_gate_times_norm_of_the_output(mesh):
    config = replace(ROUTED, saliency=True, n_shared=0)
    layer = config.build(16, n_layers=1, dtype="float32", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, LENGTH, 16)), jnp.float32)

    x_nd = np.asarray(x).reshape(-1, 16)
    scores = jax.nn.softmax(x_nd @ layer.router[...])
    gates, experts = (np.asarray(a) for a in jax.lax.top_k(scores, 2))
    gates = gates / gates.sum(-1, keepdims=True)
    expected = np.zeros(8)
    for n in range(len(x_nd)):
        for k in range(2):
            gate, up, down = (w[...][experts[n, k]] for w in (layer.gate, layer.up, layer.down))
            y = (jax.nn.silu(x_nd[n] @ gate) * (x_nd[n] @ up)) @ down
            expected[experts[n, k]] += gates[n, k] * np.linalg.norm(y)

    graph, state = nnx.split(layer)
    with use(make_mesh(MESHES.get(mesh, MeshConfig()), jax.devices()[: 1 if mesh == "one" else 8])):
        statistics = jax.jit(lambda state, x: nnx.merge(graph, state)(x)[1]["statistics"])(state, x)
    np.testing.assert_allclose(statistics["saliency"], expected, rtol=1e-4)


def test_experts_that_do_not_divide_over_the_axis_are_refused():
    params = nnx.state(nnx.eval_shape(lambda: Decoder(model_config(replace(ROUTED, n_experts=6)), rngs=nnx.Rngs(0))))
    with pytest.raises(ConfigError, match=r"mlp.*\(experts\) has size 6, which mesh axis expert=8 cannot split"):
        state_shardings(params, make_mesh(MeshConfig(fsdp=1, expert=8)))
