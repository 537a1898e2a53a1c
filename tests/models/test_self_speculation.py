"""Drafting with the first layers: the tokens of plain decoding, whatever the drafts are worth."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx
from scipy.stats import chi2

from efftrain.errors import ConfigError
from efftrain.models.cache import empty_cache
from efftrain.models.decoding.generate import AllLayers, decode_tokens, generate, generate_report, prefill
from efftrain.models.decoding.sampling import Sampling, probabilities, sample
from efftrain.models.decoding.self_speculation import SelfSpeculation, accept, extra_slots, speculate
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.models.moe import MoE

LENGTHS = np.array([1, 5, 3], np.int32)
N_NEW = 9


def prompts() -> np.ndarray:
    return np.where(np.arange(5) < LENGTHS[:, None], tiny.tokens(3, 5, seed=3), 0).astype(np.int32)


def agreeing(model_config, seed: int = 0):
    """A model whose late layers change little, so that drafts are often right, and often not."""
    model = tiny.build(model_config, seed)
    for stack in model.blocks:
        fade = jnp.where(jnp.arange(model_config.n_repeats) < 1, 1.0, 0.15)
        stack.attention.out.kernel[...] *= fade[:, None, None]
        if hasattr(stack.mlp, "down") and hasattr(stack.mlp.down, "kernel"):
            stack.mlp.down.kernel[...] *= fade[:, None, None]
    return model


@pytest.fixture(scope="module")
def model():
    return agreeing(tiny.config(n_repeats=2))


@pytest.fixture(scope="module")
def greedy(model):
    return np.asarray(generate(model, prompts(), LENGTHS, n_new=N_NEW))


@pytest.mark.parametrize("speculation", [
    SelfSpeculation(exit_layer=1, n_draft=1),
    SelfSpeculation(exit_layer=2, n_draft=4),
    SelfSpeculation(exit_layer=3, n_draft=3),
    SelfSpeculation(exit_layer=2, n_draft=12),
], ids=str)  # fmt: skip
def test_greedy_output_is_that_of_all_layers(model, greedy, speculation):
    """Rows of different lengths, of which some drafts are accepted and some are not."""
    found = generate_report(model, prompts(), LENGTHS, n_new=N_NEW, depth=speculation)
    np.testing.assert_array_equal(found.tokens_bn, greedy)
    if speculation.exit_layer == 2:
        assert 0 < float(found.acceptance_b.mean()) < 1


def test_a_row_alone_takes_as_few_rounds_as_its_drafts_allow(model, greedy):
    """With every draft right, a round gives n_draft + 1 tokens."""
    same = tiny.build(tiny.config(n_repeats=2))
    for stack in same.blocks:
        fade = (jnp.arange(2) < 1)[:, None, None]
        stack.attention.out.kernel[...] *= fade
        stack.mlp.down.kernel[...] *= fade
    graph, state = nnx.split(same)
    speculation = SelfSpeculation(exit_layer=2, n_draft=3)
    first, cache = prefill(same, prompts()[1:2], LENGTHS[1:2], slots=5 + N_NEW + extra_slots(speculation))
    first = first.argmax(-1).astype(jnp.int32)
    found = speculate(graph, state, first, cache, jax.random.key(0), N_NEW, Sampling(), speculation)
    assert (int(found.rounds), int(found.accepted_b[0]), int(found.drafted_b[0])) == (2, 6, 6)
    expected = generate(same, prompts()[1:2], LENGTHS[1:2], n_new=N_NEW)
    np.testing.assert_array_equal(found.tokens_bn, expected)


def test_a_mixture_of_experts_drafts_for_itself():
    block = replace(tiny.PLAIN, mlp=MoE(n_experts=4, top_k=2, d_expert=8))
    model = tiny.build(tiny.config(pattern=(block,), n_repeats=3))
    plain = generate(model, prompts(), LENGTHS, n_new=N_NEW)
    depth = SelfSpeculation(exit_layer=1, n_draft=3)
    np.testing.assert_array_equal(generate(model, prompts(), LENGTHS, n_new=N_NEW, depth=depth), plain)


def test_the_end_token_ends_a_row_in_the_middle_of_a_draft(model, greedy):
    end = int(next(row[i] for row in greedy for i in range(2, N_NEW - 1) if row[i] not in row[:i]))
    plain = generate(model, prompts(), LENGTHS, n_new=N_NEW, end_token=end)
    depth = SelfSpeculation(exit_layer=2, n_draft=4)
    np.testing.assert_array_equal(generate(model, prompts(), LENGTHS, n_new=N_NEW, end_token=end, depth=depth), plain)
    assert (np.asarray(plain) == end).any()


def test_drafts_take_no_cache_of_their_own():
    """What the compiled loops hold beside parameters, at the sizes of a request: less than a twentieth more."""
    model = tiny.build(tiny.config(pattern=(tiny.PLAIN,), n_repeats=4, max_length=1024))
    graph, state = nnx.split(model)
    speculation, n_new, first = SelfSpeculation(exit_layer=1, n_draft=4), 512, jnp.zeros(1, jnp.int32)

    def held(run, extra, *how):
        cache = jax.eval_shape(lambda: empty_cache(model.config, 1, 512 + n_new + extra))
        compiled = run.lower(graph, state, first, cache, jax.random.key(0), n_new, Sampling(), *how).compile()
        memory = compiled.memory_analysis()
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        return held + memory.temp_size_in_bytes + memory.output_size_in_bytes

    plain = held(decode_tokens, 0, AllLayers(), None, 0.0, None, None)
    assert held(speculate, extra_slots(speculation), speculation) <= 1.05 * plain


def counted(tokens, n):
    return np.bincount(np.asarray(tokens), minlength=n)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.8), Sampling(temperature=1.3, top_k=4)], ids=str)
def test_accepted_and_replaced_tokens_follow_the_full_model(sampling):
    """First and second token of 40,000 rounds, drafted from another distribution; chi-square at 99.9 %."""
    n, vocab, rng = 40_000, 6, np.random.default_rng(0)
    p_logits, q_logits = (jnp.asarray(rng.normal(size=(3, vocab)) * 1.5, jnp.float32) for _ in range(2))
    q = jnp.stack([probabilities(q_logits[i], sampling) for i in range(2)])
    draft_key, key = jax.random.split(jax.random.key(1))
    drafts = jnp.stack(
        [sample(jnp.tile(q_logits[i], (n, 1)), jax.random.fold_in(draft_key, i), sampling) for i in range(2)], axis=1
    )
    tokens, accepted = accept(jnp.tile(p_logits, (n, 1, 1)), drafts, jnp.tile(q, (n, 1, 1)), sampling, key)
    limit = 20.5 if sampling.top_k is None else 16.3  # 5 and 3 degrees of freedom
    for i, rows in enumerate((slice(None), np.asarray(accepted) >= 1, np.asarray(accepted) == 2)):
        p = np.asarray(probabilities(p_logits[i], sampling))
        counts = counted(tokens[rows, i], vocab)
        assert counts.sum() > 5000
        assert not counts[p == 0].any()
        expected = p[p > 0] * counts.sum()
        assert ((counts[p > 0] - expected) ** 2 / expected).sum() < limit
    drawn = counted(drafts[:, 0], vocab)
    p = np.asarray(probabilities(p_logits[0], sampling))
    assert ((drawn[p > 0] - p[p > 0] * n) ** 2 / (p[p > 0] * n)).sum() > limit  # drafts alone do not


def test_sampled_text_is_distributed_as_that_of_all_layers(model):
    """The third new token of 6,000 rows, over a vocabulary of 29: two samples, chi-square at 99.9 %."""
    n, sampling = 6000, Sampling(temperature=1.0, top_k=6)
    rows, lengths = np.tile(prompts()[1:2], (n, 1)), np.full(n, 5, np.int32)
    depth = SelfSpeculation(exit_layer=2, n_draft=2)
    a, b = (
        generate(model, rows, lengths, n_new=3, sampling=sampling, key=jax.random.key(seed), depth=d)
        if d
        else generate(model, rows, lengths, n_new=3, sampling=sampling, key=jax.random.key(seed))
        for seed, d in ((1, depth), (2, None))
    )
    for i in range(3):
        x, y = counted(a[:, i], 29), counted(b[:, i], 29)
        there = x + y > 10
        statistic = ((x[there] - y[there]) ** 2 / (x[there] + y[there])).sum()
        assert statistic < chi2.ppf(0.999, there.sum() - 1)


def test_probabilities_are_those_of_the_sampler():
    logits = jnp.asarray([[0.3, 2.0, 1.0, 1.0, -4.0]])
    sampling = Sampling(temperature=0.7, top_k=3)
    p = probabilities(logits, sampling)
    weights = np.exp(np.array([2.0, 1.0, 1.0]) / 0.7)
    np.testing.assert_allclose(p[0, 1:4], weights / weights.sum(), rtol=1e-5)
    assert p[0, 0] == p[0, 4] == 0
    chex.assert_trees_all_close(probabilities(logits, Sampling(temperature=1.0)), jax.nn.softmax(logits))


def test_what_cannot_draft_is_refused(model):
    def run(m=model, **changes):
        generate(m, prompts(), LENGTHS, n_new=3, **changes)

    for exit_layer in (0, 4, 9):
        message = f"speculation.exit_layer is {exit_layer} and the model has 4 layers; give 1 to 3"
        with pytest.raises(ConfigError, match=message):
            run(depth=SelfSpeculation(exit_layer=exit_layer))
    with pytest.raises(ConfigError, match=r"speculation\.n_draft is 0"):
        SelfSpeculation(exit_layer=1, n_draft=0)
    with pytest.raises(ConfigError, match="max_layers_b has no effect in self-speculation"):
        run(depth=SelfSpeculation(exit_layer=1), max_layers_b=np.array([1, 2, 3]))
    for capacity in (0.25, 1.0):
        depth = MixtureOfDepths(capacity=capacity)
        routed = tiny.build(tiny.config(pattern=(tiny.PLAIN, replace(tiny.PLAIN, depth=depth))))
        for changes in ({"depth": SelfSpeculation(exit_layer=1)}, {"max_layers_b": np.array([1, 2, 3])}):
            with pytest.raises(ConfigError, match="needs a stack of blocks that every token passes once, and layer 1"):
                run(routed, **changes)
    dropping = replace(tiny.PLAIN, mlp=MoE(n_experts=4, d_expert=8, dispatch="capacity"))
    with pytest.raises(ConfigError, match="layer 0 may drop a token because of others"):
        run(tiny.build(tiny.config(pattern=(dropping,))), depth=SelfSpeculation(exit_layer=1))
