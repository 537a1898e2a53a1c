"""The step as a function: sums over micro-batches, one update, and what a step that is not finite leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import ATTENTION, MODEL, SPOILED, VOCAB, nan_at_spoiled, walk

from efftrain.models.config import BlockConfig, LayerDropout
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Embedding, Linear, RMSNorm
from efftrain.models.moe import MoE
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer
from efftrain.train.averages import average_decay
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW, with_clipping
from efftrain.train.state import TrainState, init_state, merge_model, split_model
from efftrain.train.step import make_step

SGD = optax.sgd(0.1)


class Bigram(nnx.Module):
    """The quickest model to compile that the objective takes."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embedding = Embedding(VOCAB, 8, rngs=rngs, dtype="float32")
        self.norm = RMSNorm(8, eps=1e-5)
        self.head = Linear(8, VOCAB, axes=("embed", "vocab"), dtype="float32", rngs=rngs)

    def hidden(self, tokens_bt, **others):
        return self.norm(self.embedding(tokens_bt)), {}

    def vocabulary_head(self):
        return self.head.cast_kernel()


def bigram(rngs: nnx.Rngs) -> Bigram:
    return Bigram(rngs=rngs)


def decoder(rngs: nnx.Rngs) -> Decoder:
    return Decoder(MODEL, rngs=rngs)


def graph_of(build) -> nnx.GraphDef:
    return split_model(build(nnx.Rngs(0)))[0]


@pytest.fixture(scope="module")
def graph():
    return graph_of(bigram)


def new_state(optimizer=SGD, *, build=bigram, ema: bool = False) -> TrainState:
    return jax.jit(lambda: init_state(build, optimizer, seed=0, ema=ema))()


def batch_of(number: int) -> dict:
    return jax.tree.map(jnp.asarray, walk(number))


def mean(pair) -> float:
    return float(pair[0]) / float(pair[1])


@pytest.fixture(scope="module")
def accumulated():
    """(state, metrics) of a decoder after one step with 1, 2 and 4 micro-batches."""
    graph, state, batch = graph_of(decoder), new_state(build=decoder), batch_of(3)
    return {n: jax.jit(make_step(graph, next_token_loss, SGD, n_microbatches=n))(state, batch) for n in (1, 2, 4)}


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_equals_the_big_batch(accumulated, n):
    (whole, whole_metrics), (parts, metrics) = accumulated[1], accumulated[n]
    for name in ("loss", "grad_norm"):
        assert mean(metrics[name]) == pytest.approx(mean(whole_metrics[name]), rel=1e-6)
    assert float(metrics["loss"][1]) == walk(3)["mask"].sum()
    for name, want in flatten(whole.params).items():
        np.testing.assert_allclose(flatten(parts.params)[name], want, atol=1e-6, err_msg=name)


def test_the_loss_is_weighted_by_tokens_and_not_by_parts(accumulated):
    """Against NumPy on the logits; the mean of the parts' means would be another number."""
    batch, model = walk(3), merge_model(graph_of(decoder), new_state(build=decoder))
    logits = np.asarray(model(jnp.asarray(batch["tokens"])), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    losses = -np.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
    mask = batch["mask"]
    assert mean(accumulated[4][1]["loss"]) == pytest.approx(losses[mask].mean(), abs=1e-5)
    naive = np.mean([losses[i::4][mask[i::4]].mean() for i in range(4)])
    assert abs(naive - losses[mask].mean()) > 1e-3


def test_the_average_follows_its_recurrence(graph):
    """The decay is 1/10, then 0.15, which is less than 2/11; a step that was skipped counts for nothing."""
    step = jax.jit(make_step(graph, nan_at_spoiled, SGD, ema_decay=0.15))
    state = new_state(ema=True)
    want = {name: np.asarray(p) for name, p in flatten(state.params).items()}
    for number, decay in ((1, 0.1), (2, None), (3, 0.15), (4, 0.15)):
        spoiled = {"positions": jnp.full((8, 8), SPOILED, jnp.int32)} if decay is None else {}
        state, _ = step(state, batch_of(number) | spoiled)
        if decay is not None:
            params = flatten(state.params).items()
            want = {name: decay * want[name] + (1 - decay) * np.asarray(p) for name, p in params}
    for name, ema in flatten(state.ema).items():
        np.testing.assert_allclose(ema, want[name], atol=1e-6, err_msg=name)
    model = merge_model(graph, state)
    np.testing.assert_array_equal(model.head.kernel[...], flatten(state.ema)["head/kernel"])
    assert np.abs(model.head.kernel[...] - flatten(state.params)["head/kernel"]).max() > 1e-4


def test_the_initial_parameters_leave_the_average():
    """Their weight is the product of all decays: with a constant 0.999 it is 37 % after 1,000 updates."""
    decays = np.asarray(average_decay(0.999, np.arange(20_000)), np.float64)
    assert np.prod(decays[:10]) < 1e-4
    assert np.prod(decays[:1000]) < 1e-15
    assert decays.max() == pytest.approx(0.999)
    # A run that was begun with the constant decay: what 1,000 updates left of them is gone after as many again.
    assert 0.999**1000 * np.prod(decays[1000:2000]) < 1e-3


def test_a_weight_that_is_zero_for_once_is_averaged(graph):
    """From 1 to exactly 0 in one step of plain descent; what is zero because it was pruned, its optimizer knows."""

    def slope(model, batch, key):
        return 8.0 * model.norm.scale.sum(), jnp.float32(1.0), {}

    step = jax.jit(make_step(graph, slope, optax.sgd(0.125), ema_decay=0.9))
    state, _ = step(new_state(optax.sgd(0.125), ema=True), batch_of(1))
    np.testing.assert_array_equal(state.params["norm"]["scale"][...], np.zeros(8))
    np.testing.assert_allclose(state.ema["norm"]["scale"][...], np.full(8, 0.1), rtol=1e-6)


def infinite_gradient(model, batch, key):
    """The loss is a number, its gradient is not: d sqrt(x) at 0."""
    loss, count, metrics = nan_at_spoiled(model, batch, key)
    spoiled = batch["positions"][0, 0] == SPOILED
    kink = jnp.sqrt(jnp.where(spoiled, 0.0 * model.norm.scale[0], 1.0))
    return jnp.where(spoiled, 1.0 + kink, loss), count, metrics


@pytest.mark.parametrize("objective", [nan_at_spoiled, infinite_gradient])
def test_a_step_that_is_not_finite_changes_only_its_counters(graph, objective):
    optimizer = with_clipping(AdamW().build(lambda step: 1.0), 1.0)
    step = jax.jit(make_step(graph, objective, optimizer, ema_decay=0.9))
    bad = batch_of(1) | {"positions": jnp.full((8, 8), SPOILED, jnp.int32)}
    before, _ = step(new_state(optimizer, ema=True), batch_of(1))
    after, metrics = step(before, bad)
    assert (mean(metrics["skipped"]), mean(metrics["bad_steps"])) == (1, 1)
    counters = {"step": 2, "bad_steps": 1, "skipped": 1}
    assert {name: int(getattr(after, name)) for name in counters} == counters
    same = {name: getattr(before, name) for name in counters}
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, **same), before)

    again, metrics = step(after, bad)
    assert (int(again.bad_steps), int(again.skipped), mean(metrics["bad_steps"])) == (2, 2, 2)
    good, metrics = step(again, batch_of(2))
    assert (int(good.bad_steps), int(good.skipped), mean(metrics["skipped"])) == (0, 2, 0)
    assert not np.array_equal(good.params["head"]["kernel"][...], before.params["head"]["kernel"][...])


ROUTED = BlockConfig(attention=ATTENTION, mlp=MoE(n_experts=4, top_k=2, d_expert=8, dispatch="reference"))
DROPPED = LayerDropout(rate=0.2, ramp_steps=4)
LEARNED = Quantization(rules=(QuantizationRule(weights=Integer(bits=4), learned_step=True),))
UNTRAINED = {
    "balance bias": {"pattern": (ROUTED,)},
    "layer dropout": {"layer_dropout": DROPPED},
    "learned steps": {"quantization": LEARNED},
    "all": {"pattern": (ROUTED,), "layer_dropout": DROPPED, "quantization": LEARNED},
}


@pytest.mark.parametrize("changes", UNTRAINED.values(), ids=UNTRAINED.keys())
def test_a_skipped_step_leaves_what_is_not_trained_to_the_bit(changes):
    """The balance bias and the count of layer dropout follow the batches, and not one that was skipped."""
    model = MODEL.replace(n_repeats=1, **changes)
    optimizer = AdamW().build(lambda step: 1.0)
    step = jax.jit(make_step(graph_of(lambda rngs: Decoder(model, rngs=rngs)), nan_at_spoiled, optimizer))
    start = new_state(optimizer, build=lambda rngs: Decoder(model, rngs=rngs))
    before, _ = step(start, batch_of(1))
    for name, array in flatten(before.model_state).items():
        if name.endswith(("bias", "steps")):
            assert not np.array_equal(array, flatten(start.model_state)[name]), name
    after, metrics = step(before, batch_of(2) | {"positions": jnp.full((8, 8), SPOILED, jnp.int32)})
    assert mean(metrics["skipped"]) == 1
    same = {name: getattr(before, name) for name in ("step", "bad_steps", "skipped")}
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(after, **same), before)


def test_a_model_that_is_assigned_to_leaves_the_state_it_is_of(graph):
    """An objective, or an evaluation in the middle of a run, may write to its model."""

    def writes(model, batch, key):
        model.norm.scale[...] = 2 * model.norm.scale[...]
        model.seen[...] += 1.0
        return next_token_loss(model, batch, key)

    def build(rngs):
        model = bigram(rngs)
        model.seen = nnx.Variable(jnp.zeros(()), axes=(), units=())
        return model

    state = new_state(build=build)
    held = jax.tree.map(np.asarray, state)
    after, _ = jax.jit(make_step(graph_of(build), writes, SGD, n_microbatches=2))(state, batch_of(1))
    assert float(after.model_state["seen"][...]) == 0  # only ``after_step`` returns what is not trained
    model = merge_model(graph_of(build), state)
    model.norm.scale[...] = jnp.zeros(8)
    model.seen[...] = jnp.ones(())
    jax.tree.map(np.testing.assert_array_equal, state, held)


def test_the_reported_learning_rate_is_the_one_that_was_used(graph):
    """Plain gradient descent moves the parameters by lr x gradient norm; also behind a skipped step."""

    def rate(step):
        return 0.1 / (1.0 + step)

    optimizer = optax.sgd(rate)
    step = jax.jit(make_step(graph, nan_at_spoiled, optimizer, learning_rate=rate))
    state, used, reported = new_state(optimizer), [], []
    for number in range(1, 5):
        batch = batch_of(number)
        if number == 2:
            batch |= {"positions": jnp.full((8, 8), SPOILED, jnp.int32)}
        before = state
        state, metrics = step(state, batch)
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before.params))
        if number != 2:
            used.append(float(moved) / mean(metrics["grad_norm"]))
            reported.append(mean(metrics["lr"]))
    np.testing.assert_allclose(reported, [0.1, 0.05, 0.1 / 3], rtol=1e-6)
    np.testing.assert_allclose(used, reported, rtol=1e-4)


def test_a_donated_state_is_gone_and_every_leaf_has_its_own_buffer(graph):
    optimizer = AdamW().build(lambda step: 1.0)
    state = new_state(optimizer, ema=True)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)
    step = jax.jit(make_step(graph, next_token_loss, optimizer, ema_decay=0.9), donate_argnums=0)
    step(state, batch_of(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_an_objective_need_not_report_its_loss(graph):
    step = jax.jit(make_step(graph, lambda *arguments: (*next_token_loss(*arguments)[:2], {}), SGD))
    batch = batch_of(1)
    _, metrics = step(new_state(), batch)
    assert 1 < mean(metrics["loss"]) < 6


def test_each_step_and_micro_batch_has_its_own_key(graph):
    """The random key is a function of seed and step, so that a resumed run draws what it would have drawn."""

    def report_key(model, batch, key):
        loss, count, _ = next_token_loss(model, batch, key)
        draw = jax.random.uniform(key)
        return loss, count, {"draw": (draw, 1.0), "square": (draw**2, 1.0)}

    step = jax.jit(make_step(graph, report_key, SGD, n_microbatches=2))
    first, metrics = step(new_state(), batch_of(1))
    assert mean(metrics["square"]) - mean(metrics["draw"]) ** 2 > 1e-9  # two draws, and not one twice
    _, later = step(first, batch_of(1))
    assert mean(later["draw"]) != mean(metrics["draw"])
    _, again = step(new_state(), batch_of(1))
    assert mean(again["draw"]) == mean(metrics["draw"])
