"""The fields that pretrained models need, against NumPy in float64, in training and with a cache; their files."""

from dataclasses import replace

import chex
import jax
import numpy as np
import optax
import pytest
import tiny_models as tiny
from flax import nnx
from numpy_llama import forward

from efftrain.config import digest, from_json, to_json
from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import prefill_flops
from efftrain.models.config import Attention, Dense
from efftrain.models.decoder import abstract_decoder
from efftrain.models.decoding.generate import generate, prefill
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.depth.early_exit import ConfidenceExit, exit_states
from efftrain.models.norms import RMS, LayerNorm
from efftrain.models.positions import NoPosition, Rotary
from efftrain.models.residual import Parallel, PostNorm, Sandwich
from efftrain.models.soft_cap import SoftCap
from efftrain.models.vocabulary import with_vocabulary
from efftrain.train.objectives.objective import next_token_loss

ATTENTION = tiny.PLAIN.attention


def block(**changes):
    return {"pattern": (replace(tiny.PLAIN, **changes),)}


def attention(**changes):
    return block(attention=replace(ATTENTION, **changes))


CASES = {
    "biases": attention(qkv_bias=True, out_bias=True),
    "qk norm over all heads": attention(qk_norm="full"),
    "scale": attention(scale=0.3),
    "rotated half": attention(position=Rotary(fraction=0.5)),
    "odd heads": attention(d_head=5, position=Rotary(fraction=0.8)),
    "zero-centred norms": attention(qk_norm=True) | {"norm": RMS(zero_centered=True)},
    "layer norms": attention(qk_norm=True) | {"norm": LayerNorm(), "norm_eps": 0.1},
    "layer norms without bias": {"norm": LayerNorm(bias=False)},
    "norms after": block(residual=PostNorm()),
    "norms on both sides": block(residual=Sandwich()),
    "parallel": block(residual=Parallel(shared_norm=False)),
    "parallel with one norm": block(residual=Parallel()),
    "GeGLU": block(mlp=Dense(d_ff=24, activation="gelu")),
    "ungated with biases": block(mlp=Dense(d_ff=24, activation="gelu_tanh", gated=False, bias=True)),
    "ungated relu": block(mlp=Dense(d_ff=24, activation="relu", gated=False)),
    "embedding multiplier": {"embedding_multiplier": 4.0, "tied_embedding": True},
    "residual multiplier": {"residual_multiplier": 0.22},
    "residual multiplier of norms after": block(residual=PostNorm()) | {"residual_multiplier": 0.22},
    "residual multiplier of parallel parts": block(residual=Parallel()) | {"residual_multiplier": 0.22},
    "logits multiplier": {"logits_multiplier": 0.125},
    "logit softcap": {"logit_softcap": 0.7},
    "head bias": {"head_bias": True, "logit_softcap": 3.0},
    "learned positions": {"learned_positions": True},
    "score soft cap": attention(score_mod=SoftCap(cap=0.5), scale=0.7),
    "sinks": attention(sinks=True),
    "sinks beside a window and a soft cap": attention(sinks=True, window=3, score_mod=SoftCap(cap=0.5)),
    "no position": attention(position=NoPosition()),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_training_and_decoding_follow_the_formulas(changes):
    """Two rows are packed in training; then one prompt of each length is continued by single tokens."""
    config = tiny.config(**{"n_repeats": 1} | changes)
    assert from_json(to_json(config)) == config != tiny.config(n_repeats=1, pattern=(tiny.PLAIN,))
    model, rows = tiny.build(config), tiny.tokens()
    packed = rows, tiny.SEGMENTS, tiny.POSITIONS
    logits = jax.jit(lambda t, s, p: model(t, segments_bt=s, positions_bt=p))(*packed)
    np.testing.assert_allclose(logits, forward(model, *packed), atol=5e-5)
    truth, lengths, each = forward(model, rows), np.array([7, 4]), np.arange(2)
    logits, cache = jax.jit(lambda t: prefill(model, t, lengths, slots=12))(rows[:, :7])
    np.testing.assert_allclose(logits, truth[each, lengths - 1], atol=5e-5)
    extend = jax.jit(lambda t, c: model.extend(t, c))
    for i in range(3):
        hidden, cache = extend(rows[each, lengths + i][:, None], cache)
        np.testing.assert_allclose(model.logits(hidden)[:, 0], truth[each, lengths + i], atol=5e-5)


STREAMS = {
    "gpt": block(residual=Parallel(), mlp=Dense(d_ff=24, gated=False)) | {"learned_positions": True, "head_bias": True},
    "gemma": block(residual=Sandwich())
    | {"embedding_multiplier": 4.0, "logit_softcap": 2.0, "tied_embedding": True, "norm": RMS(zero_centered=True)},
    "granite": block(residual=PostNorm()) | {"residual_multiplier": 0.5, "logits_multiplier": 0.25},
}


@pytest.fixture(scope="module", params=STREAMS.values(), ids=STREAMS)
def stream(request):
    return tiny.build(tiny.config(**request.param))


def test_exits_and_drafts_decode_the_tokens_of_the_formulas(stream):
    """An exit that no token takes, and a draft that the whole model verifies."""
    prompts, n_new = tiny.tokens(2, 5), 4
    rows = prompts
    for _ in range(n_new):
        rows = np.concatenate([rows, forward(stream, rows)[:, -1:].argmax(-1)], axis=1)
    for depth in (ConfidenceExit(threshold=2.0), SelfSpeculation(exit_layer=1, n_draft=2)):
        found = generate(stream, prompts, np.array([5, 5]), n_new=n_new, depth=depth)
        np.testing.assert_array_equal(found, rows[:, 5:])
    left = exit_states(stream, rows, ConfidenceExit(threshold=2.0), 2.0)
    np.testing.assert_allclose(stream.exit_logits(left.x_btd), forward(stream, rows), atol=5e-5)


def test_the_training_loss_is_that_of_the_logits_with_its_gradients(stream):
    graph, state = nnx.split(stream)
    batch = tiny.rows(tiny.tokens(2, 9))

    def plain(state):
        model = nnx.merge(graph, state)
        logits = model(batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).sum()

    found = jax.jit(jax.value_and_grad(lambda state: next_token_loss(nnx.merge(graph, state), batch, None)[0]))(state)
    wanted = jax.jit(jax.value_and_grad(plain))(state)
    chex.assert_trees_all_close(found, wanted, atol=2e-5, rtol=2e-4)
    for path, gradient in jax.tree_util.tree_leaves_with_path(found[1]):
        assert np.abs(gradient).max() > 1e-5, path


def test_the_embedding_multiplier_is_rounded_to_the_dtype():
    """As transformers does: 33.94 is 34 in bfloat16."""
    model = tiny.build(tiny.config(embedding_multiplier=33.941, dtype="bfloat16"))
    table = np.asarray(model.embedding.table[...].astype("bfloat16"), np.float32)
    want = np.asarray((table[3] * 34).astype("bfloat16"), np.float32)
    found = model.embed(np.array([[3]]), np.array([[0]]))
    np.testing.assert_array_equal(np.asarray(found, np.float32)[0, 0], want)


def test_the_bare_kernel_is_no_head_of_bounded_logits(stream):
    config = stream.config
    if config.head_bias or config.logit_softcap or config.logits_multiplier != 1:
        with pytest.raises(ConfigError, match=r"which head_kernel\(\) does not include; use normalised\(\) and"):
            stream.head_kernel()


@pytest.mark.parametrize("max_length", [30, 16])
def test_a_larger_vocabulary_keeps_head_bias_and_learned_positions(max_length):
    model = tiny.build(tiny.config(learned_positions=True, head_bias=True, n_repeats=1))
    grown = with_vocabulary(model, 34, max_length=max_length, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(grown(tiny.tokens())[..., :29], model(tiny.tokens()), atol=1e-6)
    assert grown(tiny.tokens()).shape == (2, 11, 34)


def test_no_part_but_products_counts_as_flops():
    """Biases, norms and looked-up positions cost nothing; without its gate the feed-forward part has two products."""
    plain, gated = tiny.config(n_repeats=1, pattern=(tiny.PLAIN,)), 2 * 16 * 24
    fields = {"learned_positions": True, "head_bias": True, "logit_softcap": 2.0, "norm": LayerNorm()}
    for residual in (PostNorm(), Sandwich(), Parallel()):
        mlp = Dense(d_ff=24, gated=False, bias=True)
        layer = replace(
            tiny.PLAIN, mlp=mlp, residual=residual,
            attention=replace(ATTENTION, qkv_bias=True, out_bias=True, scale=0.3, score_mod=SoftCap(cap=3.0)),
        )  # fmt: skip
        found = abstract_decoder(plain.replace(pattern=(layer,), **fields))
        assert prefill_flops(found, 11) == pytest.approx(prefill_flops(abstract_decoder(plain), 11) - gated)


def test_configurations_of_earlier_versions_keep_their_digest():
    """No new field is written at its default. The digest is of the version before these fields."""
    assert digest(tiny.config()) == "7a080e209485360ffe781fa096bcf1d0"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(n_heads=2, n_kv_heads=1, d_head=4, qk_norm="all"), "attention.qk_norm is 'all'; use False"),
        (lambda: Attention(n_heads=2, n_kv_heads=1, d_head=4, scale=0.0), "attention.scale is 0.0; give a positive"),
        (lambda: Dense(d_ff=4, activation="tanh"), "mlp.activation is 'tanh'; use one of 'silu', 'gelu', 'gelu_tanh'"),
        (lambda: SoftCap(cap=-1.0), "score_mod.cap is -1.0; give a positive number, or no score_mod"),
        (lambda: tiny.config(logit_softcap=0.0), "model.logit_softcap is 0.0; give a positive number"),
        (
            lambda: tiny.config(head_bias=True, tied_embedding=True),
            "model.head_bias needs a head of its own; set model.tied_embedding to False",
        ),
    ],
)
def test_what_is_impossible_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
