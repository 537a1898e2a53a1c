"""Decoding with a cache against repeated full forward passes in NumPy, and the sampler against its distribution."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from numpy_llama import forward

from efftrain.errors import ConfigError
from efftrain.models.cache import empty_cache
from efftrain.models.decoder import Decoder
from efftrain.models.decoding import generate as decode
from efftrain.models.decoding.generate import generate, prefill
from efftrain.models.decoding.sampling import Sampling, probabilities, sample
from efftrain.models.decoding.self_speculation import SelfSpeculation

N_NEW = 6
LENGTHS = np.array([1, 5, 3], np.int32)
DRAW = Sampling(temperature=1.5, top_k=7)


def prompts(garbage: int) -> np.ndarray:
    """Three prompts of different lengths; behind each, the same token over and over."""
    return np.where(np.arange(5) < LENGTHS[:, None], tiny.tokens(3, 5, seed=3), garbage).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    """One local and one global layer. The window (3) is shorter than what is decoded."""
    return tiny.build(tiny.config(n_repeats=1))


@pytest.fixture(scope="module")
def greedy(model):
    return np.asarray(generate(model, prompts(0), LENGTHS, n_new=N_NEW))


@pytest.fixture(scope="module")
def drawn(model):
    return np.asarray(generate(model, prompts(0), LENGTHS, n_new=N_NEW, sampling=DRAW, key=jax.random.key(5)))


@pytest.mark.smoke
def test_greedy_takes_the_likeliest_token_of_the_full_forward_pass(model, greedy):
    for prompt, length, continuation in zip(prompts(0), LENGTHS, greedy, strict=True):
        row = list(prompt[:length])
        for token in continuation:
            assert token == forward(model, [row])[0, -1].argmax()
            row.append(token)
    assert len(set(greedy.ravel().tolist())) > 5  # not one token over and over, which would prove little


def test_padding_may_hold_anything(model, greedy):
    chex.assert_trees_all_equal(np.asarray(generate(model, prompts(28), LENGTHS, n_new=N_NEW)), greedy)


def test_a_prompt_alone_continues_as_it_does_in_a_batch(model, greedy):
    """A batch of one takes another way through the cache."""
    alone = generate(model, prompts(9)[1:2], LENGTHS[1:2], n_new=N_NEW)
    chex.assert_trees_all_equal(np.asarray(alone), greedy[1:2])


def test_the_loop_compiles_once_for_a_shape(model, greedy):
    before = decode.decode_tokens._cache_size()
    assert before > 0
    generate(model, prompts(1), LENGTHS[::-1].copy(), n_new=N_NEW)
    generate(tiny.build(model.config, seed=1), prompts(2), LENGTHS, n_new=N_NEW, key=jax.random.key(3))
    assert decode.decode_tokens._cache_size() == before


def test_the_end_token_fills_the_rest_of_its_row(model, greedy):
    """The end token is one behind which the row would draw another; rows that never draw it go on."""
    end = next(row[i] for row in greedy for i in range(1, N_NEW - 1) if row[i + 1] != row[i] not in row[:i])
    expected = [row.copy() for row in greedy]
    for row in expected:
        if end in row:
            row[list(row).index(end) :] = end
    out = generate(model, prompts(0), LENGTHS, n_new=N_NEW, end_token=int(end))
    np.testing.assert_array_equal(out, expected)
    assert (np.array(expected) != greedy).any()
    assert any(end not in row for row in expected)


def ended_at(greedy: np.ndarray, ends: list[int]) -> list[list[int]]:
    """Each row up to its first end token, which fills the rest."""
    expected = [row.tolist() for row in greedy]
    for row in expected:
        if found := [i for i, token in enumerate(row) if token in ends]:
            row[found[0] :] = [row[found[0]]] * (len(row) - found[0])
    return expected


def test_any_of_several_end_tokens_ends_a_row(model, greedy):
    """Each row fills up with the one that it has drawn, also where all rows end early."""
    ends = [int(row[i]) for i, row in zip((1, 2, 3), greedy, strict=True)]
    expected = ended_at(greedy, ends)
    assert len({row[-1] for row in expected}) > 1
    out = generate(model, prompts(0), LENGTHS, n_new=N_NEW, end_token=ends)
    np.testing.assert_array_equal(out, expected)
    speculation = SelfSpeculation(exit_layer=1, n_draft=3)
    drafted = generate(model, prompts(0), LENGTHS, n_new=N_NEW, end_token=tuple(ends), depth=speculation)
    np.testing.assert_array_equal(drafted, expected)
    np.testing.assert_array_equal(generate(model, prompts(0), LENGTHS, n_new=N_NEW, end_token=()), greedy)


def test_decoding_stops_when_every_row_has_ended(model, greedy, monkeypatch):
    """Row 1 alone, ending with its first token: the model is not called for a second one."""
    calls = []
    monkeypatch.setattr(Decoder, "logits", counted(Decoder.logits, calls))
    # Another number of tokens than elsewhere: what was compiled before does not count.
    out = generate(model, prompts(9)[1:2], LENGTHS[1:2], n_new=N_NEW + 1, end_token=int(greedy[1, 0]))
    jax.block_until_ready(out)
    assert (np.asarray(out) == greedy[1, 0]).all()
    assert len(calls) == 1  # behind the prompt


def counted(inner, calls):
    def logits(self, hidden):
        jax.debug.callback(lambda: calls.append(1))
        return inner(self, hidden)

    return logits


def test_the_same_key_draws_the_same_tokens(model, greedy, drawn):
    def draw(seed):
        return np.asarray(generate(model, prompts(0), LENGTHS, n_new=N_NEW, sampling=DRAW, key=jax.random.key(seed)))

    np.testing.assert_array_equal(draw(5), drawn)
    assert (draw(6) != drawn).any()
    assert (drawn != greedy).any()


def test_drawn_tokens_are_among_the_likeliest_of_their_own_context(model, drawn):
    for prompt, length, continuation in zip(prompts(0), LENGTHS, drawn, strict=True):
        row = list(prompt[:length])
        for token in continuation:
            assert token in np.argsort(forward(model, [row])[0, -1])[-DRAW.top_k :]
            row.append(token)


def test_pieces_give_what_the_whole_row_gives(model):
    """Prompts of different lengths, then 3 tokens more in each row, then 1, then 1."""
    rows = tiny.tokens(3, 11, seed=4)
    truth = forward(model, rows)
    padded = np.where(np.arange(5) < LENGTHS[:, None], rows[:, :5], 17)
    logits, cache = jax.jit(lambda t: prefill(model, t, LENGTHS, slots=12))(padded)
    extend = jax.jit(lambda t, c: model.extend(t, c))
    each = np.arange(3)[:, None]
    np.testing.assert_allclose(logits, truth[each[:, 0], LENGTHS - 1], atol=2e-5)
    for n in (3, 1, 1):
        positions = np.asarray(cache.lengths_b)[:, None] + np.arange(n)
        hidden, cache = extend(rows[each, positions], cache)
        np.testing.assert_allclose(model.logits(hidden), truth[each, positions], atol=2e-5)
    np.testing.assert_array_equal(cache.lengths_b, LENGTHS + 5)


def test_extending_an_empty_cache_is_a_prefill(model):
    """The fresh path skips the slots; both must fill them alike."""
    tokens, cache = tiny.tokens(2, 5), empty_cache(model.config, 2, 8)
    slow, fast = (jax.jit(lambda t, f=f: model.extend(t, cache, fresh=f))(tokens) for f in (False, True))
    chex.assert_trees_all_close(slow, fast, atol=2e-5)


def test_the_cache_has_the_shape_and_type_of_the_model():
    config = tiny.config(dtype="bfloat16")
    cache = empty_cache(config, 3, 20)
    shapes = [(layer.k_bksd.shape, layer.v_bksd.shape) for layer in cache.layers]
    assert shapes == [((3, 2, 20, 4),) * 2, ((3, 2, 20, 8),) * 2] * 2
    assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers)} == {jnp.dtype("bfloat16")}


def test_bfloat16_decodes_near_float32(model):
    graph, _ = nnx.split(nnx.eval_shape(lambda: Decoder(model.config.replace(dtype="bfloat16"), rngs=nnx.Rngs(0))))
    rounded = nnx.merge(graph, nnx.state(model))
    rows = tiny.tokens(3, 6)

    @jax.jit
    def last_logits(rows):
        _, cache = prefill(rounded, rows[:, :5], jnp.full(3, 5), slots=6)
        hidden, cache = rounded.extend(rows[:, 5:], cache)
        return rounded.logits(hidden[:, 0]), cache

    logits, cache = last_logits(rows)
    assert cache.layers[0].k_bksd.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, forward(model, rows)[:, -1], atol=0.15)


def chi_square(tokens, probabilities):
    """Of the counts against the expected ones, over the tokens that can occur."""
    possible = probabilities > 0
    expected = probabilities[possible] * len(tokens)
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[~possible].any()
    return ((counts[possible] - expected) ** 2 / expected).sum()


@pytest.mark.parametrize(
    ("sampling", "limit"),
    [
        (Sampling(temperature=1.0), 18.5),  # the 99.9 % quantile at 4 degrees of freedom
        (Sampling(temperature=0.5), 18.5),
        (Sampling(temperature=2.0, top_k=3), 13.8),  # 2 degrees
        (Sampling(temperature=1.0, top_k=5), 18.5),
        (Sampling(temperature=1.0, top_k=99), 18.5),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling, limit):
    logits = np.array([0.3, -1.0, 1.2, 0.0, 0.8])
    weights = np.exp(logits / sampling.temperature)
    if sampling.top_k:
        weights[np.argsort(-logits)[sampling.top_k :]] = 0
    tokens = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (20_000, 1)), jax.random.key(1), sampling)
    assert tokens.dtype == jnp.int32
    assert chi_square(np.asarray(tokens), weights / weights.sum()) < limit
    other = np.exp(logits / (sampling.temperature * 1.5)) * (weights > 0)
    assert chi_square(np.asarray(tokens), other / other.sum()) > limit  # the test does tell temperatures apart


def test_top_k_draws_no_more_than_k_of_equal_tokens():
    """Equal logits (untrained tokens have them) must not widen the choice."""
    logits = jnp.tile(jnp.asarray([0.0, 2.0, 1.0, 1.0, 1.0]), (500, 1))
    tokens = sample(logits, jax.random.key(0), Sampling(temperature=1.0, top_k=2))
    assert len(set(np.asarray(tokens).tolist())) == 2


def test_one_of_one_is_greedy():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)), jnp.float32)
    one = sample(logits, jax.random.key(0), Sampling(temperature=3.0, top_k=1))
    np.testing.assert_array_equal(one, np.asarray(logits).argmax(-1))
    np.testing.assert_array_equal(sample(logits, jax.random.key(0), Sampling()), np.asarray(logits).argmax(-1))


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ConfigError, match=r"prompt and new tokens are 25 together and model.max_length is 24"):
        generate(model, prompts(0), LENGTHS, n_new=20)
    with pytest.raises(ConfigError, match=r"n_new is 0; it must be at least 1"):
        generate(model, prompts(0), LENGTHS, n_new=0)
    with pytest.raises(ConfigError, match=r"sampling.temperature is 0.7, which needs a key"):
        generate(model, prompts(0), LENGTHS, n_new=2, sampling=Sampling(temperature=0.7))
    for temperature in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=f"sampling.temperature is {temperature}"):
            Sampling(temperature=temperature)
    with pytest.raises(ConfigError, match=r"sampling.top_k is 0; it must be at least 1"):
        Sampling(top_k=0)
    for top_k in (2.5, float("nan")):
        with pytest.raises(ConfigError, match=f"sampling.top_k is {top_k}; it must be a whole number"):
            Sampling(top_k=top_k)
    with pytest.raises(ConfigError, match=r"the prompts have \[1, 0\] tokens"):
        generate(model, [[1], []], n_new=1)
    with pytest.raises(ConfigError, match=r"the prompts have \[\] tokens"):
        generate(model, [], n_new=1)
    with pytest.raises(ConfigError, match=r"prompts are lists, which have their own lengths"):
        generate(model, [[1]], np.array([1]), n_new=1)


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1.2e-38, 1e-36, 1e-31])
@pytest.mark.parametrize("top_k", [None, 3])
def test_the_smallest_temperatures_draw_the_likeliest_token(temperature, top_k):
    """Where logits over the temperature overflow, and where float32 has no such number. Padding is masked."""
    rng = np.random.default_rng(0)
    logits = np.concatenate([rng.normal(size=(40, 9)) * 30, np.full((40, 1), -np.inf)], 1).astype(np.float32)
    cold = Sampling(temperature=temperature, top_k=top_k)
    np.testing.assert_array_equal(sample(jnp.asarray(logits), jax.random.key(0), cold), logits.argmax(-1))
    np.testing.assert_array_equal(probabilities(jnp.asarray(logits), cold), np.eye(10)[logits.argmax(-1)])


def test_the_largest_temperatures_draw_evenly_and_nothing_that_is_masked():
    logits = jnp.tile(jnp.asarray([3.0, -2.0, -jnp.inf]), (400, 1))
    for temperature in (1e30, 3e38, 1e300):
        drawn = sample(logits, jax.random.key(0), Sampling(temperature=temperature))
        assert chi_square(np.asarray(drawn), np.array([0.5, 0.5, 0])) < 10.8  # the 99.9 % quantile, 1 degree of freedom


def test_prompts_may_be_lists(model, greedy):
    rows = [row[:length].tolist() for row, length in zip(prompts(0), LENGTHS, strict=True)]
    chex.assert_trees_all_equal(np.asarray(generate(model, rows, n_new=N_NEW)), greedy)
    whole = prompts(0)[1:2]  # an array without lengths is prompts of its width
    chex.assert_trees_all_equal(np.asarray(generate(model, whole, n_new=N_NEW)), greedy[1:2])


def test_the_last_token_may_stand_at_the_last_position(model):
    rows = tiny.tokens(1, 23)
    out = generate(model, rows, np.array([23]), n_new=1)
    assert out[0, 0] == forward(model, rows)[0, -1].argmax()
