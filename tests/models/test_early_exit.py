"""Exits by confidence: rows at once against a token at a time, and against the layers called by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny

from efftrain.errors import ConfigError
from efftrain.models.cache import Cache
from efftrain.models.decoding.generate import generate, generate_report, prefill
from efftrain.models.depth.early_exit import (
    ConfidenceExit,
    ExitProbe,
    advance,
    confidence,
    exit_states,
    extend_until_sure,
    fit_exit_probe,
)

LENGTH = 9


@pytest.fixture(scope="module")
def model():
    return tiny.build(tiny.config())


@pytest.fixture(scope="module")
def probe():
    rng = np.random.default_rng(2)
    return ExitProbe(jnp.asarray(rng.normal(size=(3, 16)), jnp.float32), jnp.zeros(3))


# Thresholds at which some tokens of the tiny model leave at each exit.
RULES = {"gap": 0.12, "similarity": 0.62, "probe": 0.7}


@pytest.fixture(scope="module", params=RULES)
def exit_(request):
    return ConfidenceExit(rule=request.param, threshold=RULES[request.param])


def by_hand(model, tokens, exit_, probe):
    """Token by token, layer by layer: the state with which each leaves, in lists."""
    n, positions = tokens.shape[1], jnp.arange(tokens.shape[1])[None]
    x, depth = model.embedding(tokens), np.zeros(n, int)
    done = np.zeros(n, bool)
    for i, layer in enumerate(model.layers()):
        y, _ = layer(x, positions)
        sure = confidence(model, exit_.rule, probe, x, y, i + 1) if i < 3 else jnp.zeros((1, n))
        for t in range(n):
            if not done[t]:
                x, depth[t] = x.at[0, t].set(y[0, t]), i + 1
                done[t] = bool(sure[0, t] >= exit_.threshold)
    return x, depth


def test_rows_at_once_leave_where_single_tokens_do(model, exit_, probe):
    tokens = tiny.tokens(1, LENGTH)
    x, depth = by_hand(model, tokens, exit_, probe)
    state = exit_states(model, tokens, exit_, exit_.threshold, probe=probe)
    np.testing.assert_array_equal(state.layers_bt[0], depth)
    np.testing.assert_allclose(state.x_btd, x, atol=1e-5)
    assert len(set(depth.tolist())) > 1


def test_a_token_at_a_time_with_a_cache_computes_the_same(model, exit_, probe):
    """Keys and values of skipped layers come from the state at the exit."""
    tokens = tiny.tokens(2, LENGTH, seed=1)
    truth = exit_states(model, tokens, exit_, exit_.threshold, probe=probe)
    cache = prefill(model, tokens[:, :1], np.ones(2, np.int32), slots=LENGTH)[1]
    # The prompt passes all layers; so that the first token does too, its layers are those of the whole rows.
    by = jax.tree_util.Partial(advance, model, (1, 2, 3), exit_.rule, threshold=exit_.threshold, probe=probe)
    cache = Cache(cache.layers, jnp.zeros(2, jnp.int32))
    layers = model.layers()

    @jax.jit
    def step(token_b, cache):
        x, positions = model.embedding(token_b[:, None]), cache.lengths_b[:, None]
        state, after = extend_until_sure(model, layers, x, positions, cache.layers, by)
        return state, Cache(after, cache.lengths_b + 1)

    for t in range(LENGTH):
        state, cache = step(tokens[:, t], cache)
        np.testing.assert_array_equal(state.layers_bt[:, 0], truth.layers_bt[:, t])
        np.testing.assert_allclose(state.x_btd[:, 0], truth.x_btd[:, t], atol=1e-5)


def test_a_threshold_above_one_is_all_layers_and_zero_the_first_exit(model):
    prompts, lengths = tiny.tokens(2, 4), np.array([4, 2])
    plain = generate(model, prompts, lengths, n_new=5)
    never = generate_report(model, prompts, lengths, n_new=5, depth=ConfidenceExit(threshold=1.1))
    np.testing.assert_array_equal(never.tokens_bn, plain)
    assert never.layers_b.tolist() == [4, 4]
    at_once = generate_report(model, prompts, lengths, n_new=5, depth=ConfidenceExit(threshold=0.0, exits=(2, 3)))
    assert at_once.layers_b.tolist() == [2, 2]


def test_a_request_limits_its_own_layers(model):
    prompts, lengths = tiny.tokens(3, 4), np.array([4, 2, 3])
    found = generate_report(model, prompts, lengths, n_new=5, max_layers_b=np.array([1, 4, 3], np.int32))
    assert found.layers_b.tolist() == [1, 4, 3]
    plain = generate(model, prompts, lengths, n_new=5)
    np.testing.assert_array_equal(found.tokens_bn[1], plain[1])
    assert (np.asarray(found.tokens_bn[0]) != np.asarray(plain[0])).any()


def test_rows_that_have_ended_hold_nobody_up(model):
    """Layers count up to the end token, and an ended row is done before the first layer."""
    prompts, lengths = tiny.tokens(3, 4), np.array([4, 2, 3])
    limit = np.array([1, 4, 4], np.int32)
    free = np.asarray(generate(model, prompts, lengths, n_new=8, max_layers_b=limit))
    end = next(t for row in free for t in row[:-1] if 0 < sum(t in other for other in free) < 3)
    found = generate_report(model, prompts, lengths, n_new=8, max_layers_b=limit, end_token=int(end))
    expected = [row.tolist() for row in free]
    for row in expected:
        if end in row:
            row[row.index(end) :] = [int(end)] * (8 - row.index(end))
    assert found.tokens_bn.tolist() == expected
    assert found.layers_b.tolist() == [0 if row[0] == end else n for row, n in zip(expected, limit, strict=True)]


def test_another_threshold_compiles_nothing(model):
    from efftrain.models.decoding import generate as decode

    prompts, lengths = tiny.tokens(2, 4), np.array([4, 2])
    generate(model, prompts, lengths, n_new=5, depth=ConfidenceExit(threshold=0.5))
    before = decode.decode_tokens._cache_size()
    generate(model, prompts, lengths, n_new=5, depth=ConfidenceExit(threshold=0.7))
    assert decode.decode_tokens._cache_size() == before


def test_confidences_are_what_they_are_called(model, probe):
    rng = np.random.default_rng(0)
    before, x = (rng.normal(size=(1, 2, 16)).astype(np.float32) for _ in range(2))
    logits = np.asarray(model.exit_logits(jnp.asarray(x)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    two = np.sort(p, axis=-1)[..., -2:]
    np.testing.assert_allclose(confidence(model, "gap", None, before, x, 1), two[..., 1] - two[..., 0], rtol=1e-4)
    cosine = (before * x).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(confidence(model, "similarity", None, before, x, 1), cosine, rtol=1e-4)
    z = np.asarray(model.norm(jnp.asarray(x))) @ np.asarray(probe.kernel_ed[1])
    np.testing.assert_allclose(confidence(model, "probe", probe, before, x, 2), 1 / (1 + np.exp(-z)), rtol=1e-4)


def test_a_probe_learns_what_can_be_told_from_the_state():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 2000, 8)).astype(np.float32)
    agree = np.stack([hidden[0, :, 3] > 0.5, rng.random(2000) < 0.8])
    found = fit_exit_probe(jnp.asarray(hidden), jnp.asarray(agree))
    told = np.asarray(found(jnp.asarray(hidden[0]), 1)) > 0
    assert (told == agree[0]).mean() > 0.97
    # What cannot be told comes out as the base rate.
    assert np.asarray(jax.nn.sigmoid(found(jnp.asarray(hidden[1]), 2))).mean() == pytest.approx(0.8, abs=0.03)


def test_what_cannot_be_is_refused(model):
    def run(depth):
        generate(model, tiny.tokens(1, 3), np.array([3]), n_new=3, depth=depth)

    with pytest.raises(ConfigError, match=r"exit\.exits is 4 and the model has 4 layers"):
        run(ConfidenceExit(exits=(2, 4)))
    with pytest.raises(ConfigError, match=r"exit\.rule is 'hope'"):
        ConfidenceExit(rule="hope")
    with pytest.raises(ConfigError, match="no probe was given"):
        run(ConfidenceExit(rule="probe"))
    for limit in ([0], [2, 3], 2):
        with pytest.raises(ConfigError, match=r"max_layers_b is .*; give each of the 1 rows a number of layers"):
            generate(model, tiny.tokens(1, 3), np.array([3]), n_new=3, max_layers_b=limit)
