"""The fields that pretrained models need, against NumPy in float64, in training and with a cache; their files."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_models as tiny
from numpy_llama import forward

from efftrain.config import digest, from_json, to_json
from efftrain.errors import ConfigError
from efftrain.models.config import Attention, Dense
from efftrain.models.decoding.generate import prefill
from efftrain.models.norms import RMS, LayerNorm
from efftrain.models.positions import NoPosition, Rotary
from efftrain.models.residual import Parallel, PostNorm, Sandwich

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


def test_configurations_of_earlier_versions_keep_their_digest():
    """No new field is written at its default. The digest is of the version before these fields."""
    assert digest(tiny.config()) == "7a080e209485360ffe781fa096bcf1d0"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(n_heads=2, n_kv_heads=1, d_head=4, qk_norm="all"), "attention.qk_norm is 'all'; use False"),
        (lambda: Attention(n_heads=2, n_kv_heads=1, d_head=4, scale=0.0), "attention.scale is 0.0; give a positive"),
        (lambda: Dense(d_ff=4, activation="tanh"), "mlp.activation is 'tanh'; use one of 'silu', 'gelu', 'gelu_tanh'"),
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
