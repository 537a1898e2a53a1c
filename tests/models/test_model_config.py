"""What a model configuration refuses, and in which words."""

import re
from dataclasses import replace

import pytest
import tiny_models as tiny

from efftrain.errors import ConfigError
from efftrain.models.config import Attention, Dense, llama

SHAPE = {"n_heads": 4, "n_kv_heads": 2, "d_head": 8}
LLAMA = {"vocab_size": 8, "d_model": 12, "n_layers": 1, "n_heads": 2, "d_ff": 4, "max_length": 4}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Attention(**SHAPE | {"n_kv_heads": 3}),
            "attention.n_heads is 4, which attention.n_kv_heads 3 does not divide; make it a multiple",
        ),
        (
            lambda: Attention(**SHAPE | {"d_head": 7}),
            "attention.d_head is 7; rotary embedding needs an even number, use 8",
        ),
        (lambda: Attention(**SHAPE | {"n_kv_heads": 0}), "attention.n_kv_heads is 0; it must be at least 1"),
        (lambda: Attention(**SHAPE, window=0), "attention.window is 0; it must be at least 1"),
        (lambda: Attention(**SHAPE, n_blocks=0), "attention.n_blocks is 0; it must be at least 1"),
        (lambda: Dense(d_ff=0), "mlp.d_ff is 0; it must be at least 1"),
        (lambda: tiny.config(pattern=()), "model.pattern is empty; give it at least one BlockConfig"),
        (lambda: tiny.config(n_repeats=0), "model.n_repeats is 0; it must be at least 1"),
        (lambda: tiny.config(vocab_size=-1), "model.vocab_size is -1; it must be at least 1"),
        (lambda: tiny.config(max_length=0), "model.max_length is 0; it must be at least 1"),
        (
            lambda: tiny.config(remat="half"),
            "model.remat is 'half'; use one of 'none', 'full', 'dots'",
        ),
        (lambda: tiny.config(dtype="float16"), "model.dtype is 'float16'; use one of 'float32', 'bfloat16'"),
        (
            lambda: llama(**LLAMA | {"n_heads": 5}),
            "model.d_model is 12, which n_heads 5 does not divide; make it a multiple",
        ),
        (lambda: llama(**LLAMA | {"n_heads": 0}), "n_heads is 0; it must be at least 1"),
        (
            lambda: llama(**LLAMA | {"n_heads": 4}),
            "attention.d_head is 3; rotary embedding needs an even number, use 4",
        ),
    ],
)
def test_an_impossible_model_names_the_field_and_the_remedy(build, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        build()


def test_layers_are_the_pattern_repeated():
    config = tiny.config(n_repeats=3)
    assert config.n_layers == 6
    assert config.layers == (tiny.PLAIN, tiny.LOCAL) * 3


def test_llama_is_one_block_repeated():
    config = llama(**LLAMA | {"n_layers": 3}, dtype="bfloat16")
    assert (config.n_layers, len(config.pattern), config.dtype) == (3, 1, "bfloat16")
    block = config.pattern[0]
    assert (block.attention.n_heads, block.attention.n_kv_heads, block.attention.d_head) == (2, 2, 6)
    assert llama(**LLAMA, n_kv_heads=1).pattern[0].attention.n_kv_heads == 1


def test_a_configuration_is_hashable_and_frozen():
    """jax.jit takes it as a static argument."""
    assert hash(tiny.config()) == hash(tiny.config())
    assert tiny.config() == tiny.config() != tiny.config(scan=True)
    with pytest.raises(AttributeError):
        tiny.config().scan = True


def test_fields_are_replaced_in_every_block():
    model = llama(vocab_size=8, d_model=8, n_layers=2, n_heads=2, d_ff=8, max_length=8)
    model = model.replace(pattern=(model.pattern[0], replace(model.pattern[0], mlp=Dense(d_ff=4))))
    found = model.with_blocks(mlp=Dense(d_ff=16))
    assert [block.mlp.d_ff for block in found.pattern] == [16, 16]
    assert [block.attention for block in found.pattern] == [block.attention for block in model.pattern]
    assert found.n_repeats == model.n_repeats
