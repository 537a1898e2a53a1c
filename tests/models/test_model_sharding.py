"""The same loss and gradients on 8 devices as on one, in every mesh that the model's axes allow."""

import chex
import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoding.generate import generate
from efftrain.models.norms import LayerNorm
from efftrain.models.residual import Sandwich
from efftrain.ops.cross_entropy import cross_entropy
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import shard_count, use

BATCH, LENGTH = 8, 16
MESHES = {
    "fsdp4-tensor2": MeshConfig(fsdp=4, tensor=2),
    "replica2-fsdp2-tensor2": MeshConfig(replica=2, fsdp=2, tensor=2),
    "fsdp2-tensor2-context2": MeshConfig(fsdp=2, tensor=2, context=2),
}


def config(scan: bool) -> ModelConfig:
    attention = Attention(n_heads=4, n_kv_heads=2, d_head=4, qk_norm=True, window=9, n_blocks=2)
    block = BlockConfig(attention=attention, mlp=Dense(d_ff=32))
    return ModelConfig(vocab_size=32, d_model=16, pattern=(block,), n_repeats=2, max_length=16, scan=scan)


def batch():
    """Three documents and padding in each row, cut at other places in each."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 32, (2, BATCH, LENGTH)).astype(np.int32)
    cuts = np.sort(rng.integers(1, LENGTH, (BATCH, 3)), axis=1)
    segments = (np.arange(LENGTH) >= cuts[:, :, None]).sum(1).astype(np.int32)
    return {"tokens": tokens, "targets": targets, "segments": segments, "weights": (segments < 3).astype(np.float32)}


def loss_and_gradients(graph):
    def loss(params, batch):
        model = nnx.merge(graph, params)
        hidden, _ = model.hidden(batch["tokens"], segments_bt=batch["segments"])
        total = cross_entropy(
            hidden,
            model.vocabulary_head(),
            batch["targets"],
            batch["weights"],
            n_chunks=2,
            shards=shard_count("batch", "length"),
        )
        return total / batch["weights"].sum()

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def on_one_device():
    graph, params = nnx.split(tiny.build(config(scan=False)))
    return params, loss_and_gradients(graph)(params, batch())


@pytest.mark.parametrize("mesh_name", ["fsdp4-tensor2", "fsdp2-tensor2-context2"])
def test_a_mesh_splits_biases_and_norms_over_all_heads(mesh_name):
    attention = Attention(n_heads=4, n_kv_heads=2, d_head=4, qk_norm="full", qkv_bias=True, out_bias=True, n_blocks=2)
    block = BlockConfig(attention=attention, mlp=Dense(d_ff=32, gated=False, bias=True), residual=Sandwich())
    model_config = config(scan=False).replace(
        pattern=(block,), n_repeats=1, norm=LayerNorm(), head_bias=True, logit_softcap=3.0, learned_positions=True
    )
    graph, params = nnx.split(tiny.build(model_config))
    loss, gradients = loss_and_gradients(graph)(params, batch())
    mesh = make_mesh(MESHES[mesh_name])
    with use(mesh):
        placed = jax.device_put(params, state_shardings(params, mesh))
        spread = NamedSharding(mesh, PartitionSpec(("replica", "fsdp", "expert"), "context"))
        mesh_loss, mesh_gradients = loss_and_gradients(graph)(placed, jax.device_put(batch(), spread))
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(mesh_gradients, gradients, rtol=1e-5, atol=1e-5)
    bias = placed.blocks[0].attention.query.bias[...]
    assert bias.addressable_shards[0].data.size * mesh.shape["tensor"] == bias.size


@pytest.mark.parametrize(
    ("mesh_name", "scan"),
    [(name, False) for name in MESHES] + [("fsdp4-tensor2", True), ("fsdp2-tensor2-context2", True)],
)
def test_a_mesh_changes_neither_loss_nor_gradients(on_one_device, mesh_name, scan):
    params, (loss, gradients) = on_one_device
    graph = nnx.split(tiny.build(config(scan)))[0]
    mesh = make_mesh(MESHES[mesh_name])
    with use(mesh):
        placed = jax.device_put(params, state_shardings(params, mesh))
        spread = NamedSharding(mesh, PartitionSpec(("replica", "fsdp", "expert"), "context"))
        mesh_loss, mesh_gradients = loss_and_gradients(graph)(placed, jax.device_put(batch(), spread))
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-5)
    chex.assert_trees_all_close(mesh_gradients, gradients, rtol=1e-5, atol=1e-5)
    kernel = placed.blocks[0].mlp.gate.kernel[...]
    held = kernel.addressable_shards[0].data.size
    assert held * mesh.shape["fsdp"] * mesh.shape["tensor"] == kernel.size  # it was divided, not copied


def test_decoding_on_a_mesh_draws_the_same_tokens():
    model = tiny.build(config(scan=False))
    prompts, lengths = batch()["tokens"][:, :5], np.array([1, 2, 3, 4, 5, 5, 4, 3], np.int32)
    alone = generate(model, prompts, lengths, n_new=4)
    mesh = make_mesh(MESHES["fsdp4-tensor2"])
    graph, params = nnx.split(model)
    with use(mesh):
        placed = nnx.merge(graph, jax.device_put(params, state_shardings(params, mesh)))
        np.testing.assert_array_equal(generate(placed, prompts, lengths, n_new=4), alone)
