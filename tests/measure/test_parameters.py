"""Counts against the arrays of a real model, and against sums by hand."""

import jax
import pytest
from flax import nnx

from efftrain.measure.cost.parameters import cache_bytes_per_token, count_parameters, stored_bytes
from efftrain.models.cache import empty_cache
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder, abstract_decoder

SHAPE = {"vocab_size": 96, "d_model": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "d_ff": 40, "max_length": 32}
BLOCK = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40 + 2 * 16  # query and out, key and value, SwiGLU, two norms


def test_untied():
    counted = count_parameters(abstract_decoder(llama(**SHAPE)))
    assert (counted.embedding, counted.head) == (96 * 16, 96 * 16)
    assert counted.non_embedding == 3 * BLOCK + 16
    assert counted.total == counted.active == 2 * 96 * 16 + 3 * BLOCK + 16


def test_a_tied_head_counts_once():
    counted = count_parameters(abstract_decoder(llama(**SHAPE, tied_embedding=True)))
    assert (counted.embedding, counted.head) == (96 * 16, 0)
    assert counted.total == 96 * 16 + 3 * BLOCK + 16


def test_bytes_are_those_of_the_arrays():
    config = llama(**SHAPE)
    model = Decoder(config, rngs=nnx.Rngs(0))
    held = sum(array.nbytes for array in jax.tree.leaves(nnx.state(model)))
    assert stored_bytes(model) == stored_bytes(abstract_decoder(config)) == held
    assert count_parameters(model) == count_parameters(abstract_decoder(config))


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_the_cache(dtype, itemsize):
    config = llama(**SHAPE, dtype=dtype)
    held = sum(array.nbytes for array in jax.tree.leaves(empty_cache(config, batch=2, slots=7).layers))
    assert cache_bytes_per_token(config) == held / (2 * 7)
    assert cache_bytes_per_token(config) == 3 * 2 * 2 * 4 * itemsize
