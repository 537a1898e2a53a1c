"""A step in micro-batches, and on several devices, against the whole batch on one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import ATTENTION, LENGTH, MODEL, walk

from efftrain.models.config import BlockConfig
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.objectives.objective import EarlyExitLoss
from efftrain.train.state import init_state, split_model
from efftrain.train.step import make_step

SGD = optax.sgd(1.0)
ROUTED = MoE(n_experts=4, top_k=2, d_expert=8, dispatch="reference", z_loss=0.5)
MODEL_CONFIG = MODEL.replace(pattern=(BlockConfig(attention=ATTENTION, mlp=ROUTED),))
FIGURES = ("loss", "loss/exits", "loss/auxiliary", "moe/entropy", "grad_norm")


def build(rngs):
    return Decoder(MODEL_CONFIG, rngs=rngs)


def batch():
    """Rows of 1 to 8 targets and up to two tokens more: a row's share of the tokens is not its share of the targets."""
    rows = walk(1)
    n_targets = rows["mask"].sum(1, keepdims=True)
    rows["segments"] = (np.arange(LENGTH) < n_targets + np.arange(len(n_targets))[:, None] % 3).astype(np.int32)
    return jax.tree.map(jnp.asarray, rows)


def exits_and_experts(model, batch, key):
    """Its whole loss is what the step reports, and not the cross entropy alone."""
    loss, count, metrics = EarlyExitLoss(scale=1.0, stride=4)(model, batch, key)
    return loss, count, {name: pair for name, pair in metrics.items() if name != "loss"}


@pytest.fixture(scope="module")
def start():
    return jax.jit(lambda: init_state(build, SGD, seed=0, ema=False))()


def step_of(start, n_microbatches: int, n_devices: int = 1):
    graph = split_model(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
    step = make_step(graph, exits_and_experts, SGD, n_microbatches=n_microbatches)
    with use(make_mesh(MeshConfig(fsdp=n_devices), jax.devices()[:n_devices])):
        return jax.device_get(jax.jit(step)(start, batch()))


@pytest.fixture(scope="module")
def whole(start):
    return step_of(start, 1)


@pytest.mark.parametrize(("n_microbatches", "n_devices"), [(4, 1), (8, 1), (1, 8), (2, 4)])
def test_a_step_is_that_of_the_whole_batch(start, whole, n_microbatches, n_devices):
    """Early exits at one token in four, and the z-loss of routers, are means by the counts of the whole batch."""
    state, metrics = step_of(start, n_microbatches, n_devices)
    for name in FIGURES:
        (total, count), (want, n) = metrics[name], whole[1][name]
        assert float(total) / float(count) == pytest.approx(float(want) / float(n), rel=1e-5), name
    wanted = flatten(whole[0].params)
    for name, array in flatten(state.params).items():
        np.testing.assert_allclose(array, wanted[name], atol=2e-5, err_msg=name)
    np.testing.assert_array_equal(
        state.model_state["blocks"][0]["mlp"]["bias"][...], whole[0].model_state["blocks"][0]["mlp"]["bias"][...]
    )


def test_some_micro_batch_has_no_target_at_an_exit():
    """Else the test above would not show what it is for: of eight parts, one has no target among the tokens drawn."""
    seen = np.asarray(batch()["mask"]).reshape(8, 2, 4)
    assert all((seen[:, :, offset].sum(1) == 0).any() for offset in range(1, 4))
