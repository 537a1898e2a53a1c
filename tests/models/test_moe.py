"""A mixture of experts in the decoder and in the training step."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import matrix_flops
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe import MoE
from efftrain.models.moe import layer as moe
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.state import init_state, split_model
from efftrain.train.step import make_step

DENSE = llama(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=16)
ROUTED = MoE(n_experts=4, top_k=2, d_expert=12)


def with_mlp(mlp, **changes):
    block = replace(DENSE.pattern[0], mlp=mlp)
    return replace(DENSE, pattern=(block,), **changes)


def batch(rows=4, seed=0):
    return tiny.rows(np.random.default_rng(seed).integers(0, 32, (rows, 17), dtype=np.int32))


def loss_and_gradient(config, rows=batch()):  # noqa: B008, not changed
    graph, params, rest = split_model(Decoder(config, rngs=nnx.Rngs(0)))

    def loss(params):
        total, count, _ = next_token_loss(nnx.merge(graph, params, rest), rows, jax.random.key(0))
        return total / count

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.fixture(scope="module")
def reference():
    return loss_and_gradient(with_mlp(replace(ROUTED, dispatch="reference")))


@pytest.mark.parametrize(
    "change",
    [{"dispatch": "blocks"}, {"dispatch": "capacity", "capacity_factor": 4.0}, {"dispatch": "ragged"}],
    ids=lambda change: change["dispatch"],
)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
def test_every_dispatch_is_the_reference(reference, change, scan):
    found = loss_and_gradient(with_mlp(replace(ROUTED, **change), scan=scan, remat="full" if scan else "none"))
    np.testing.assert_allclose(found[0], reference[0], rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found[1]), jax.tree.leaves(reference[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))


@pytest.mark.smoke
def test_every_parameter_learns_also_with_one_expert_a_token():
    _, gradient = loss_and_gradient(with_mlp(replace(ROUTED, top_k=1, n_shared=1)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert jnp.abs(leaf).max() > 0, path


def test_auxiliary_losses_are_trained_on_and_not_reported_as_loss():
    plain = next_token_loss(Decoder(with_mlp(ROUTED), rngs=nnx.Rngs(0)), batch(), None)
    heavy = replace(ROUTED, auxiliary_loss=0.5, z_loss=0.1)
    added = next_token_loss(Decoder(with_mlp(heavy), rngs=nnx.Rngs(0)), batch(), None)
    assert float(added[0] - plain[0]) > 0.5 * float(plain[1])  # at least 0.5 for each of two layers, times the count
    np.testing.assert_allclose(added[2]["loss"][0], plain[2]["loss"][0], rtol=1e-6)


def padded(rows):
    """The rows after a filler row, each with as much padding as tokens, as the loader makes them."""

    def fill(a):
        return np.concatenate([np.zeros((1, 2 * a.shape[1]), a.dtype), np.concatenate([a, 0 * a], axis=1)])

    return {name: fill(a) for name, a in rows.items()}


@pytest.mark.parametrize(
    "change",
    [{"dispatch": "blocks"}, {"dispatch": "capacity", "capacity_factor": 1.6}, {"dispatch": "reference"}],
    ids=lambda change: change["dispatch"],
)
def test_padding_is_no_load_and_changes_no_figure(change):
    """5 of 8 rows would be padding, and all of it would go to the same experts and take their capacity."""
    mlp = replace(ROUTED, auxiliary_loss=0.5, z_loss=0.1, **change)
    model = Decoder(with_mlp(mlp, n_repeats=1), rngs=nnx.Rngs(0))
    rows = tiny.rows(np.random.default_rng(1).integers(0, 32, (3, 9), dtype=np.int32))
    run = jax.jit(lambda rows: next_token_loss(model, rows, None))
    (loss, count, metrics), (want, n, wanted) = run(padded(rows)), run(rows)
    assert float(count) == float(n) == 24
    loads = np.asarray(metrics["statistics"][0]["loads"])
    assert loads.sum() == 24 * 2
    np.testing.assert_array_equal(loads, wanted["statistics"][0]["loads"])
    assert [float(v) for v in metrics["moe/dropped"]] == [0, 48]
    for name in ("loss", "loss/auxiliary", "moe/entropy"):
        np.testing.assert_allclose(metrics[name], wanted[name], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_without_padding_nothing_changes_to_the_bit():
    layer = replace(ROUTED, auxiliary_loss=0.5, z_loss=0.1).build(16, n_layers=1, dtype="float32", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 7, 16)), jnp.float32)
    run = jax.jit(lambda segments: layer(x, segments_bt=segments))
    (y, found), (want, wanted) = run(jnp.ones((3, 7), jnp.int32)), run(None)
    np.testing.assert_array_equal(y, want)
    for name in ("auxiliary", "moe/dropped", "statistics"):
        jax.tree.map(np.testing.assert_array_equal, found[name], wanted[name])
    np.testing.assert_allclose(found["moe/entropy"], wanted["moe/entropy"], rtol=1e-6)  # summed in another order
    filler, metrics = run(jnp.zeros((3, 7), jnp.int32))
    assert not np.asarray(filler).any()
    assert all(np.isfinite(leaf).all() and not leaf.any() for leaf in jax.tree.leaves(metrics))


def train(config, steps=3, n_microbatches=1):
    optimizer = AdamW(peak_lr=1e-2).build(lambda step: 1.0)
    graph = split_model(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
    state = init_state(lambda rngs: Decoder(config, rngs=rngs), optimizer, seed=0, ema=False)
    step = jax.jit(make_step(graph, next_token_loss, optimizer, n_microbatches=n_microbatches))
    for number in range(steps):
        before, (state, metrics) = state, step(state, batch(seed=number))
    return graph, before, state, metrics


def bias_of(state):
    return np.asarray(state.model_state["blocks"][0]["mlp"]["bias"][...])


def test_the_bias_moves_once_a_step_by_the_global_loads():
    graph, before, after, _ = train(with_mlp(replace(ROUTED, bias_rate=0.1)))
    model = nnx.merge(graph, before.params, before.model_state)
    rows = batch(seed=2)
    metrics = next_token_loss(model, rows, None)[2]
    loads = np.asarray(metrics["statistics"][0]["loads"])
    assert loads.shape == (2, 4)
    assert loads.sum(-1).tolist() == [4 * 16 * 2] * 2
    expected = bias_of(before) + 0.1 * (1 - loads / loads.mean(-1, keepdims=True))
    np.testing.assert_allclose(bias_of(after), expected, atol=1e-6)
    assert np.abs(bias_of(after)).max() > 0.02


def test_micro_batches_and_remat_change_neither_bias_nor_parameters():
    """Counted twice under recomputation is how others got it wrong."""
    config = with_mlp(replace(ROUTED, bias_rate=0.1))
    _, _, whole, _ = train(config)
    _, _, parts, _ = train(replace(config, remat="full", scan=True), n_microbatches=4)
    np.testing.assert_allclose(bias_of(parts), bias_of(whole), atol=1e-6)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_figures_of_the_routing_are_reported():
    *_, metrics = train(with_mlp(ROUTED))
    loads = metrics.pop("moe/loads/0")[0]
    assert loads.shape == (2, 4)
    np.testing.assert_allclose(loads.mean(-1), 1, rtol=1e-6)
    figures = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert figures["moe/max_violation"] == pytest.approx(float(loads.max(-1).mean()) - 1, rel=1e-5)
    assert 0 < figures["moe/entropy"] <= 2 * np.log(4)
    assert figures["moe/dropped"] == 0
    assert figures["moe/max_violation"] >= 0
    assert 0 <= figures["moe/least_load"] <= 1


def test_an_expert_that_starves_is_counted_until_it_is_fed(monkeypatch):
    monkeypatch.setattr(moe, "STARVED_STEPS", 3)
    layer = ROUTED.build(16, n_layers=1, dtype="float32", rngs=nnx.Rngs(0))
    layer.bias, layer.starved = moe.BalanceBias(jnp.zeros((2, 4))), moe.StarvedSteps(jnp.zeros((2, 4), jnp.int32))
    hungry = jnp.array([[100.0, 100.0, 100.0, 0.5], [75.0, 75.0, 75.0, 75.0]])
    shares = [float(np.divide(*layer.after_step({"loads": hungry})[moe.COLLAPSED])) for _ in range(4)]
    assert shares == [0, 0, 1 / 8, 1 / 8]
    fed = layer.after_step({"loads": jnp.full((2, 4), 75.0)})
    assert float(fed[moe.COLLAPSED][0]) == 0
    assert layer.starved[...].sum() == 0


def test_a_layer_that_was_left_out_is_left_alone(monkeypatch):
    """It has no loads: its bias stays, nobody starves there, and the figures are those of the other layer."""
    layer = ROUTED.build(16, n_layers=1, dtype="float32", rngs=nnx.Rngs(0))
    layer.bias, layer.starved = moe.BalanceBias(jnp.ones((2, 4))), moe.StarvedSteps(jnp.ones((2, 4), jnp.int32))
    found = layer.after_step({"loads": jnp.array([[90.0, 60.0, 90.0, 60.0], [0.0, 0.0, 0.0, 0.0]])})
    assert layer.bias[...][1].tolist() == [1, 1, 1, 1]
    assert layer.bias[...][0, 1] > 1 > layer.bias[...][0, 0]
    assert layer.starved[...].tolist() == [[0] * 4, [1] * 4]
    figures = [float(np.divide(*found[f"moe/{name}"])) for name in ("max_violation", "least_load")]
    assert figures == pytest.approx([0.2, 0.8])


def test_dropped_assignments_are_counted():
    *_, metrics = train(with_mlp(replace(ROUTED, dispatch="capacity", capacity_factor=0.5)), steps=1)
    total, count = metrics["moe/dropped"]
    assert 0.5 <= float(total / count) < 1


def test_active_and_total_parameters_are_counted_apart():
    dense, routed = abstract_decoder(with_mlp(DENSE.pattern[0].mlp)), abstract_decoder(with_mlp(ROUTED))
    dense_count, count = count_parameters(dense), count_parameters(routed)
    router = 2 * 16 * 4
    assert count.active == dense_count.active + router  # two experts of half the width
    assert count.total == count.active + 2 * 3 * 16 * 24
    assert matrix_flops(routed) == matrix_flops(dense) + 2 * router


def test_experts_start_with_the_spread_of_a_dense_layer():
    """The expert axis does not count as fan."""
    model = Decoder(replace(with_mlp(replace(ROUTED, n_experts=64)), d_model=64), rngs=nnx.Rngs(0))
    assert float(model.blocks[0].mlp.gate[...].std()) == pytest.approx(64**-0.5, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 5}, r"moe\.top_k is 5 but there are 4 experts"),
        ({"top_k": 1, "renormalize": True}, r"moe\.renormalize with top_k 1"),
        ({"d_expert": 0}, r"moe\.d_expert"),
        ({"bias_rate": -1.0}, r"moe\.bias_rate"),
        ({"dispatch": "magic"}, r"moe\.dispatch is 'magic'"),
        ({"capacity_factor": 0.0}, r"moe\.capacity_factor"),
    ],
)
def test_impossible_mixtures_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(ROUTED, **change)
