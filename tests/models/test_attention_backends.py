"""A model gives the same loss and gradients whichever kernel its attention runs on, alone and on a mesh."""

import functools

import chex
import jax
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoding.generate import generate
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use

LENGTH = 64


def config(backend: str, **changes) -> ModelConfig:
    """A local and a global block, both with grouped heads."""
    local = Attention(n_heads=4, n_kv_heads=2, d_head=4, window=20, qk_norm=True, backend=backend)
    blocks = (local, Attention(n_heads=4, n_kv_heads=2, d_head=4, backend=backend))
    pattern = tuple(BlockConfig(attention=attention, mlp=Dense(d_ff=32)) for attention in blocks)
    return ModelConfig(vocab_size=32, d_model=16, pattern=pattern, n_repeats=1, max_length=LENGTH, **changes)


def batch():
    rng = np.random.default_rng(0)
    cuts = rng.integers(1, LENGTH, (4, 3, 1))
    return rng.integers(0, 32, (4, LENGTH)).astype(np.int32), (np.arange(LENGTH) >= cuts).sum(1).astype(np.int32)


def loss_and_gradients(backend: str, mesh=None, **changes):
    graph, params = nnx.split(tiny.build(config(backend, **changes)))
    if mesh is not None:
        params = jax.device_put(params, state_shardings(params, mesh))

    direction = np.random.default_rng(1).normal(size=(4, LENGTH, 16)).astype(np.float32)

    def loss(params, tokens, segments):
        hidden, _ = nnx.merge(graph, params).hidden(tokens, segments_bt=segments)
        return (hidden * direction).sum(-1).mean()

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params, *batch()))


@functools.cache
def reference():
    return loss_and_gradients("xla")


def check(loss, gradients):
    np.testing.assert_allclose(loss, reference()[0], atol=1e-5)
    chex.assert_trees_all_close(gradients, reference()[1], rtol=1e-5, atol=1e-5)
    attention = gradients.blocks[0].attention
    assert all(np.abs(g).max() > 0.01 for g in jax.tree.leaves(attention))


@pytest.mark.parametrize("changes", [{}, {"scan": True, "remat": "full"}, {"remat": "dots"}], ids=str)
def test_tpu_kernel_in_a_model(changes):
    loss, gradients = loss_and_gradients("splash", **changes)
    check(loss, gradients)


@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=2, tensor=2, context=2), MeshConfig(fsdp=1, tensor=2, context=4)],
    ids=["fsdp4-tensor2", "fsdp2-tensor2-context2", "tensor2-context4"],
)
def test_tpu_kernel_in_a_model_on_a_mesh(mesh_config):
    mesh = make_mesh(mesh_config)
    with use(mesh):
        loss, gradients = loss_and_gradients("splash", mesh)
    check(loss, gradients)


def test_decoding_after_a_prefill_by_the_kernel():
    """Prompts of unequal length, no multiple of anything; the new tokens read the cache by the plain code."""
    prompts, lengths = batch()[0][:, :7], np.array([3, 7, 5, 1], np.int32)
    tokens = [generate(tiny.build(config(name)), prompts, lengths, n_new=3) for name in ("splash", "xla")]
    np.testing.assert_array_equal(*tokens)


def test_kernel_of_another_platform_stops_before_the_first_step():
    with pytest.raises(ConfigError, match="'cudnn', which needs a GPU, and the devices are cpu; use 'auto'"):
        jax.eval_shape(tiny.build(config("cudnn")), *batch()[:1])


def test_unknown_kernel_is_refused_by_the_configuration():
    with pytest.raises(ConfigError) as error:
        config("flash")
    assert str(error.value) == "attention.backend is 'flash'; use one of 'auto', 'xla', 'splash', 'cudnn'"
