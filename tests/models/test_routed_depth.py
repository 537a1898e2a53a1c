"""Mixture of depths and recursion against the blocks that they are made of, called by hand on chosen tokens."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import decode_flops, matrix_flops, training_flops
from efftrain.measure.cost.parameters import cache_bytes_per_token, count_parameters
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.decoding.generate import generate, generate_report, prefill
from efftrain.models.depth.depth_router import best, causal_metrics, first
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion, RoutedDepth, causally_routed
from efftrain.models.moe import MoE
from efftrain.train.objectives.objective import next_token_loss

LENGTH = 12


def config(depth, n_repeats=2, **changes) -> ModelConfig:
    """A plain block, and one of this depth."""
    return tiny.config(pattern=(tiny.PLAIN, replace(tiny.PLAIN, depth=depth)), n_repeats=n_repeats, **changes)


DEPTHS = {
    "mixture": MixtureOfDepths(capacity=0.34),
    "auxiliary": MixtureOfDepths(capacity=0.34, causal="auxiliary"),
    "recursion": Recursion(n_layers=2, shares=(1.0, 0.5, 0.25)),
    "recursion of some": Recursion(shares=(0.75, 0.75, 0.25)),
}


@pytest.fixture(scope="module", params=DEPTHS)
def model(request):
    return tiny.build(config(DEPTHS[request.param]))


def routed(model) -> RoutedDepth:
    return model.layers()[1]


@pytest.mark.parametrize(
    ("depth", "passes"),
    [
        (MixtureOfDepths(capacity=1.0), 1),
        (Recursion(shares=(1.0,)), 1),
        (Recursion(shares=(1.0, 1.0)), 2),
    ],
    ids=str,
)
def test_a_capacity_of_one_is_the_block_as_often_as_it_says(depth, passes):
    model = tiny.build(config(depth, n_repeats=1))
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
    positions = jnp.tile(jnp.arange(LENGTH), (2, 1))
    expected = x
    for _ in range(passes):
        expected, _ = routed(model).layers[0](expected, positions)
    found, metrics = routed(model)(x, positions)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert float(metrics["depth/passes"][0] / metrics["depth/passes"][1]) == passes


def by_hand(module: RoutedDepth, x: np.ndarray) -> np.ndarray:
    """One row, round by round with a loop over what is left."""
    left, x = np.arange(len(x)), jnp.asarray(x)
    gate = {}
    for level, share in enumerate(module.config.capacities()):
        if str(level) in module.routers:
            scores = module.routers[str(level)](x[None, left])[0]
            n = int(np.ceil(share * len(x)))
            keep = np.sort(np.argsort(-np.asarray(scores), kind="stable")[:n])
            left, gate = left[keep], 2 / (1 + np.exp(-np.asarray(scores)[keep]))
        else:
            gate = np.ones(len(left))
        y = x[None, left]
        for layer in module.layers:
            y, _ = layer(y, jnp.asarray(left)[None])
        x = x.at[left].set(x[left] + gate[:, None] * (y[0] - x[left]))
    return x


def test_the_best_tokens_pass_in_order_with_their_positions(model):
    x = np.random.default_rng(1).normal(size=(2, LENGTH, 16)).astype(np.float32)
    found, _ = routed(model)(jnp.asarray(x), jnp.tile(jnp.arange(LENGTH), (2, 1)))
    for row in range(2):
        np.testing.assert_allclose(found[row], by_hand(routed(model), x[row]), atol=2e-5)
    assert np.abs(found - x).max() > 0.1


def test_padding_does_not_take_the_place_of_a_token():
    scores = jnp.asarray([[9.0, 1.0, 3.0, 2.0, 8.0]])
    real = jnp.asarray([[True, True, True, True, False]])
    choice = best(jnp.where(real, scores, -jnp.inf), 2)
    assert choice.indices_bn.tolist() == [[0, 2]]
    more = best(jnp.where(real, scores, -jnp.inf), 5)
    assert more.valid_bn.sum() == 4
    assert np.isfinite(more.gates_bn).all()


def test_the_first_wanted_tokens_pass_until_the_room_is_taken():
    wanted = jnp.asarray([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]], bool)
    choice = first(wanted, jnp.zeros((2, 5)), 2)
    assert choice.indices_bn[0].tolist() == [1, 3]
    assert choice.indices_bn[1, 0] == 4
    assert choice.valid_bn.tolist() == [[True, True], [True, False]]
    np.testing.assert_allclose(choice.gates_bn, 1)


def test_documents_of_a_row_do_not_see_each_other(model):
    causal = causally_routed(model)
    tokens, segments = tiny.tokens(), jnp.asarray(tiny.SEGMENTS)
    logits = jax.jit(lambda t: causal(t, segments_bt=segments, positions_bt=tiny.POSITIONS))
    moved = tokens.copy()
    moved[0, 1] = (moved[0, 1] + 5) % 29
    before, after = logits(tokens), logits(moved)
    np.testing.assert_allclose(before[0, 4:], after[0, 4:], atol=1e-5)  # other places, other rounding
    assert np.abs(before - after)[0, :4].max() > 1e-4


def test_decoding_computes_what_the_causally_routed_model_does(model):
    """Prompts of different lengths, then pieces; the room is never taken here."""
    roomy = tiny.build(with_room(model.config, 4.0))
    tokens, lengths = tiny.tokens(3, 11, seed=4), np.array([1, 5, 3], np.int32)
    truth = causally_routed(roomy)(tokens)
    logits, cache = jax.jit(lambda t: prefill(roomy, t, lengths, slots=12))(tokens[:, :5])
    each = np.arange(3)[:, None]
    np.testing.assert_allclose(logits, truth[each[:, 0], lengths - 1], atol=3e-5)
    extend = jax.jit(lambda t, c: roomy.extend(t, c))
    for n in (1, 3, 1, 1):
        positions = np.asarray(cache.lengths_b)[:, None] + np.arange(n)
        hidden, cache = extend(tokens[each, positions], cache)
        np.testing.assert_allclose(roomy.logits(hidden), truth[each, positions], atol=3e-5)
    stored = np.asarray(cache.layers[1].stored_lb)
    assert not cache.layers[1].overflow_lb.any()
    assert 0 < stored.sum() < 11 * stored.size  # some pass and some do not


def test_layers_of_new_tokens_are_counted(model):
    """By what the caches hold in the end: all new tokens but the last were read."""
    roomy = tiny.build(with_room(model.config, 4.0))
    prompts, lengths = tiny.tokens(2, 4), np.array([4, 3])
    found = generate_report(roomy, prompts, lengths, n_new=7)
    rows = np.zeros((2, 10), np.int32)
    for row, (n, new) in enumerate(zip(lengths, np.asarray(found.tokens_bn), strict=True)):
        rows[row, : n + 6] = [*prompts[row, :n], *new[:6]]
    counts = []
    for n_read in (lengths, lengths + 6):
        cache = prefill(roomy, rows, n_read, slots=12)[1]
        counts.append(sum(layer.passed_b() for layer in cache.layers if hasattr(layer, "passed_b")))
    np.testing.assert_allclose(found.layers_b, 2 + (counts[1] - counts[0]) / 6, rtol=1e-6)


def with_room(model: ModelConfig, room: float) -> ModelConfig:
    return model.replace(
        pattern=tuple(
            replace(block, depth=replace(block.depth, room=room)) if hasattr(block.depth, "room") else block
            for block in model.pattern
        )
    )


def test_a_prompt_of_which_more_than_expected_passes_is_computed_in_full():
    """One row of which all tokens pass, in room for them; and a short prompt beside a long one decides as alone."""
    model = tiny.build(config(MixtureOfDepths(capacity=0.25, room=4.0), n_repeats=1))
    tight = tiny.build(config(MixtureOfDepths(capacity=0.25, room=1.2), n_repeats=1, max_length=240))
    tokens, lengths = tiny.tokens(2, 12, seed=5), np.array([12, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efftrain.models.depth.depth_router.Router.predict", lambda self, x: jnp.ones(x.shape[:2]))
        (a, full), (b, found) = (
            jax.jit(lambda t, m=m: prefill(m, t, lengths, slots=14))(tokens) for m in (model, tight)
        )
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert found.layers[1].stored_lb.tolist() == full.layers[1].stored_lb.tolist() == [[12, 3]]
        alone, _ = jax.jit(lambda t: prefill(tight, t, lengths[1:], slots=4))(tokens[1:, :3])
        np.testing.assert_allclose(alone[0], b[1], atol=1e-5)


def test_a_full_cache_skips_tokens_and_counts_them():
    """All tokens want to pass and there is room for 4 of 8; what was stored is left alone."""
    model = tiny.build(config(MixtureOfDepths(capacity=0.5, room=1.0), n_repeats=1, max_length=8))
    router = model.blocks[1].routers["0"]
    router.into.kernel[...] = jnp.zeros_like(router.into.kernel[...])  # it predicts 0, so that no token passes
    tokens = tiny.tokens(2, 8)
    none = prefill(model, tokens, np.array([8, 8]), slots=8)[1].layers[1]
    assert none.stored_lb.tolist() == [[0, 0]]

    def all_pass(self, x):
        return jnp.ones(x.shape[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efftrain.models.depth.depth_router.Router.predict", all_pass)
        _, cache = prefill(model, tokens[:, :6], np.array([6, 3]), slots=8)
        assert cache.layers[1].stored_lb.tolist() == [[4, 3]]
        assert cache.layers[1].overflow_lb.tolist() == [[2, 0]]
        kept = cache.layers[1].levels[0][0].k_bksd
        for piece in (tokens[:, 6:7], tokens[:, 5:7], tokens[:, 7:8]):
            _, cache = model.extend(piece, cache)
        assert cache.layers[1].stored_lb.tolist() == [[4, 4]]
        assert cache.layers[1].overflow_lb.tolist() == [[6, 3]]
        after = cache.layers[1].levels[0][0].k_bksd
        np.testing.assert_array_equal(after[0, :, :4], kept[0, :, :4])
        np.testing.assert_array_equal(after[1, :, :3], kept[1, :, :3])


def test_the_predictor_learns_apart_from_the_model(model):
    """Its loss moves it, and nothing before it; the router learns through its gate."""
    batch = tiny.rows(tiny.tokens(2, LENGTH + 1))
    graph, state = nnx.split(model)

    def loss(state, weight):
        total, _, metrics = next_token_loss(nnx.merge(graph, state), batch, None)
        return metrics["loss"][0] + weight * (total - metrics["loss"][0])

    alone, both = (jax.jit(jax.grad(lambda s, w=w: loss(s, w)))(state) for w in (0.0, 1.0))
    for (path, a), (_, b) in zip(nnx.to_flat_state(alone), nnx.to_flat_state(both), strict=True):
        name = ".".join(map(str, path))
        predicts = ".into." in name or (".out." in name and "routers" in name)
        if predicts:
            assert np.abs(b[...]).max() > 0, name
            assert not np.abs(a[...]).any(), name
        elif "auxiliary" not in str(model.config):
            np.testing.assert_allclose(a[...], b[...], atol=1e-6, err_msg=name)
        if name.endswith("score.kernel"):
            assert np.abs(a[...]).max() > 1e-6


def test_the_loss_of_a_prediction_is_that_of_independent_coins():
    logits = jnp.asarray([[2.0, -1.0, 0.5, 9.0]])
    chosen, real = jnp.asarray([[True, False, False, True]]), jnp.asarray([[True, True, True, False]])
    found = causal_metrics(logits, chosen, real, 0.5)
    p = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5])))
    expected = -np.log(np.array([p[0], 1 - p[1], 1 - p[2]])).mean()
    assert float(found["auxiliary"]) == pytest.approx(0.5 * expected, rel=1e-6)
    assert [float(v) for v in found["depth/predicted_right"]] == [2, 3]
    assert [float(v) for v in found["depth/predicted"]] == [2, 3]


def test_flops_count_expected_passes():
    """Of a block of 25 % a quarter, with a quarter of the keys; of a recursion 1 + 1/2 + 1/4 times the layers."""
    length = 256
    plain = abstract_decoder(tiny.config(pattern=(tiny.PLAIN,), n_repeats=2, max_length=length))
    one_layer = training_flops(plain, length) - training_flops(
        abstract_decoder(tiny.config(pattern=(tiny.PLAIN,), n_repeats=1, max_length=length)), length
    )
    quarter = abstract_decoder(config(MixtureOfDepths(capacity=0.25, causal="none"), n_repeats=1, max_length=length))
    router = 3 * 2 * 16
    attention = 3 * 4 * 16 * (length + 1) / 2
    expected = training_flops(plain, length) - one_layer + router + 0.25 * (one_layer - attention)
    expected += 0.25 * 3 * 4 * 16 * (length / 4 + 1) / 2
    assert training_flops(quarter, length) == pytest.approx(expected)
    assert count_parameters(quarter).active < count_parameters(quarter).total
    assert decode_flops(quarter, 100) < decode_flops(plain, 100)

    looped = abstract_decoder(config(Recursion(shares=(1.0, 0.5, 0.25), causal="none"), n_repeats=1))
    routers = 2 * 16 * (1 + 0.5)
    assert matrix_flops(looped) == pytest.approx(matrix_flops(plain) * (1 + 1.75) / 2 + routers)
    assert count_parameters(looped).total == count_parameters(plain).total + 2 * 16
    share = cache_bytes_per_token(quarter.config) / cache_bytes_per_token(plain.config)
    assert share == pytest.approx((1 + 0.375) / 2, rel=0.02)


def test_experts_in_a_looped_layer_are_balanced_by_all_rounds():
    block = replace(tiny.PLAIN, mlp=MoE(n_experts=4, top_k=2, d_expert=8), depth=Recursion(shares=(1.0, 0.5)))
    model = tiny.build(tiny.config(pattern=(block,), n_repeats=1))
    batch = tiny.rows(tiny.tokens(2, LENGTH + 1))
    _, _, metrics = next_token_loss(model, batch, None)
    loads = metrics["statistics"][0]["0"]["loads"]
    assert loads.shape == (1, 4)
    assert loads.sum() == 2 * 2 * (LENGTH + LENGTH / 2)
    before = np.asarray(model.blocks[0].layers[0].mlp.bias[...])
    figures = model.after_step(metrics["statistics"])
    assert np.abs(np.asarray(model.blocks[0].layers[0].mlp.bias[...]) - before).max() > 0
    assert "moe/loads/0" in figures


def test_what_cannot_be_is_refused():
    for make, message in (
        (lambda: MixtureOfDepths(capacity=0.0), "mixture_of_depths.capacity is 0.0"),
        (lambda: MixtureOfDepths(capacity=1.5), "mixture_of_depths.capacity is 1.5"),
        (lambda: MixtureOfDepths(room=0.5), "mixture_of_depths.room is 0.5"),
        (lambda: MixtureOfDepths(causal="guess"), "mixture_of_depths.causal is 'guess'"),
        (lambda: Recursion(shares=(0.5, 1.0)), "give no round a larger share"),
        (lambda: Recursion(shares=()), r"recursion.shares is \(\)"),
        (lambda: Recursion(n_layers=0), "recursion.n_layers is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    blind = tiny.build(config(MixtureOfDepths(causal="none"), n_repeats=1))
    with pytest.raises(ConfigError, match=r"depth\.causal is 'none'"):
        generate(blind, tiny.tokens(1, 4), np.array([4]), n_new=2)
