"""A mesh changes where the numbers are, not what they are."""

import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.train.objective import next_token_loss


@functools.cache  # one device is asked for again
def loss_and_gradients(mesh_config, n_devices, *, scan):
    model = llama(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_length=16, scan=scan)
    mesh = make_mesh(mesh_config, jax.devices()[:n_devices])
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    shardings = state_shardings(abstract, mesh)
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 64)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": jnp.cumsum(tokens[:, :-1] < 4, axis=1) + 1,
        "positions": jnp.broadcast_to(jnp.arange(16), (8, 16)),
        "mask": tokens[:, 1:] != 7,
    }

    def mean_loss(params):
        total, count, _ = next_token_loss(nnx.merge(graph, params), batch, jax.random.key(2))
        return total / count

    with use(mesh):
        init = jax.jit(lambda: nnx.state(Decoder(model, rngs=nnx.Rngs(0))), out_shardings=shardings)
        step = jax.jit(jax.value_and_grad(mean_loss), out_shardings=(None, shardings))
        return jax.device_get(step(init()))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=2, context=2)], ids=["4x2", "2x2x2"]
)
def test_loss_and_gradients_equal_those_of_one_device(mesh, scan):
    loss, gradients = loss_and_gradients(mesh, 8, scan=scan)
    loss_of_one, gradients_of_one = loss_and_gradients(MeshConfig(), 1, scan=scan)
    assert abs(loss - loss_of_one) < 1e-5
    chex.assert_trees_all_close(gradients, gradients_of_one, atol=1e-5)
    assert all(abs(g).max() > 1e-4 for g in jax.tree.leaves(gradients))
