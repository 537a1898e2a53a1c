"""FLOPs against formulas by hand, a brute-force mask, and XLA's own count of the compiled program."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efftrain.measure.cost.flops import (
    decode_flops,
    matrix_flops,
    mean_computed_keys,
    mean_visible_keys,
    prefill_flops,
    training_flops,
    training_hardware_flops,
)
from efftrain.models.cache import empty_cache
from efftrain.models.config import Attention, BlockConfig, Dense, MlpConfig, ModelConfig, llama
from efftrain.models.decoder import abstract_decoder
from efftrain.models.decoding.generate import prefill
from efftrain.models.linear import Embedding, Linear
from efftrain.train.objectives.objective import next_token_loss

BATCH, LENGTH = 2, 256
ELEMENTWISE = 1.05  # XLA counts norms, softmax and the like too


def pattern_of_two(*, window=None, n_blocks=4, **changes) -> ModelConfig:
    """A block with a window and one without; attention costs as much as the rest, so that a wrong count of it shows."""

    def block(window, d_ff):
        attention = Attention(n_heads=2, n_kv_heads=1, d_head=64, window=window, n_blocks=n_blocks)
        return BlockConfig(attention=attention, mlp=Dense(d_ff=d_ff))

    pattern = (block(window, 96), block(None, 160))
    return ModelConfig(vocab_size=128, d_model=64, pattern=pattern, n_repeats=1, max_length=LENGTH, **changes)


def xla_flops(function, *arguments) -> float:
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def integers(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_blocks": 1},
        {"window": 48},
        {"tied_embedding": True},
        {"remat": "full"},
        {"remat": "dots"},
    ],
    ids=str,
)
def test_training_agrees_with_xla(changes):
    config = pattern_of_two(**changes)
    graph, state = nnx.split(abstract_decoder(config))

    def loss(state, batch):
        return next_token_loss(nnx.merge(graph, state), batch, None)[0]

    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), integers(BATCH, LENGTH))
    batch["mask"] = jax.ShapeDtypeStruct((BATCH, LENGTH), bool)
    per_token = xla_flops(jax.value_and_grad(loss), state, batch) / (BATCH * LENGTH)
    counted = training_hardware_flops(abstract_decoder(config), LENGTH)
    assert counted < per_token < ELEMENTWISE * counted


def test_decoding_agrees_with_xla():
    config = pattern_of_two()
    graph, state = nnx.split(abstract_decoder(config))
    cache = jax.eval_shape(lambda: empty_cache(config, BATCH, LENGTH))

    def one_token(state, tokens, cache):
        model = nnx.merge(graph, state)
        return model.logits(model.extend(tokens, cache)[0])

    per_token = xla_flops(one_token, state, integers(BATCH, 1), cache) / BATCH
    counted = decode_flops(abstract_decoder(config), LENGTH)
    assert counted < per_token < ELEMENTWISE * counted


def test_prefill_agrees_with_xla():
    """One query block computes the masked half too: twice the visible pairs, but for the diagonal."""
    config = pattern_of_two(n_blocks=1)
    graph, state = nnx.split(abstract_decoder(config))

    def read(state, prompts, lengths):
        return prefill(nnx.merge(graph, state), prompts, lengths, slots=LENGTH)[0]

    per_token = xla_flops(read, state, integers(BATCH, LENGTH), integers(BATCH)) / (BATCH * LENGTH)
    masked = 2 * 4 * 2 * 64 * (LENGTH - 1) / 2  # two layers, two heads of 64
    counted = prefill_flops(abstract_decoder(config), LENGTH) + masked
    assert counted < per_token < ELEMENTWISE * counted


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.smoke
def test_llama_by_hand(tied, scan):
    """Grouped queries: 8 heads of 8 share 2 heads of keys and values."""
    config = llama(
        vocab_size=96,
        d_model=64,
        n_layers=3,
        n_heads=8,
        n_kv_heads=2,
        d_ff=160,
        max_length=32,
        tied_embedding=tied,
        scan=scan,
    )
    model = abstract_decoder(config)
    matrices = 3 * (64 * 64 + 2 * 64 * 16 + 64 * 64 + 3 * 64 * 160)
    head = 64 * 96
    pairs = sum(range(1, 33)) / 32  # keys that a token sees, on average
    attention = 3 * 2 * 64 * pairs  # multiply-adds: scores and weighted values, all heads together 64 wide
    assert training_flops(model, 32) == 3 * 2 * (matrices + head + attention)
    assert prefill_flops(model, 32) == 2 * (matrices + head / 32 + attention)
    assert decode_flops(model, 20) == 2 * (matrices + head + 3 * 2 * 64 * 20)


def test_a_window_bounds_what_is_seen():
    windowed, full = (abstract_decoder(pattern_of_two(window=w)) for w in (10, None))
    layer = 4 * 2 * 64  # FLOPs for each key
    assert decode_flops(full, 100) - decode_flops(windowed, 100) == layer * 90
    assert decode_flops(full, 10) == decode_flops(windowed, 10)
    seen = np.minimum(np.arange(1, 101), 10).mean()
    assert training_flops(full, 100) - training_flops(windowed, 100) == pytest.approx(3 * layer * (50.5 - seen))


@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_keys_of_a_mask_drawn_out(length, window):
    query, key = np.indices((length, length))
    visible = (key <= query) & (query - key < (window or length))
    assert mean_visible_keys(length, window) == pytest.approx(visible.sum() / length)
    assert mean_computed_keys(length, window, 1) == length
    for n_blocks in (3, 4, 50):
        computed = mean_computed_keys(length, window, n_blocks)
        assert visible.sum() / length <= computed <= length
    assert mean_computed_keys(length, None, length) == (length + 1) / 2


@dataclass(frozen=True, kw_only=True)
class ForkedMlp(MlpConfig):
    """What a fork may bring: a Linear, a matrix and a vector of its own, a table."""

    def build(self, d_model, *, n_layers, dtype, rngs):
        return ForkedModule(d_model, dtype, rngs)


class ForkedModule(nnx.Module):
    def __init__(self, d_model, dtype, rngs):
        self.up = Linear(d_model, 24, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.own = nnx.Param(jnp.ones((24, d_model)), axes=("mlp", "embed"), units=(24, d_model))
        self.scale = nnx.Param(jnp.ones((d_model,)), axes=("norm",), units=(d_model,))
        self.table = Embedding(50, d_model, rngs=rngs, dtype=dtype)


def test_a_forks_block_is_counted():
    attention = Attention(n_heads=2, n_kv_heads=2, d_head=8)
    block = BlockConfig(attention=attention, mlp=ForkedMlp())
    model = abstract_decoder(ModelConfig(vocab_size=32, d_model=16, pattern=(block,), n_repeats=5, max_length=8))
    assert matrix_flops(model) == 2 * 5 * (4 * 16 * 16 + 16 * 24 + 24 * 16)
