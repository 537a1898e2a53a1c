"""Decoding reads the parameters where they lie: XLA's account of its programs, and a model taken apart."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.models.config import Dense
from efftrain.models.decoding import generate as decode
from efftrain.models.decoding.generate import AllLayers, generate
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.decoding.unrolled import unrolled
from efftrain.models.depth.early_exit import ConfidenceExit
from efftrain.models.depth.routed_depth import MixtureOfDepths

WIDE = replace(tiny.PLAIN, mlp=Dense(d_ff=512))
ROUTED = replace(WIDE, depth=MixtureOfDepths(capacity=0.5))
KINDS = {
    "plain": (WIDE, AllLayers()),
    "routed depth": (ROUTED, AllLayers()),
    "early exit": (WIDE, ConfidenceExit()),
    "self-speculation": (WIDE, SelfSpeculation(exit_layer=2, n_draft=3)),
}
PROMPT, LENGTH = tiny.tokens(1, 5), np.array([5])


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unstacked"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_of_decoding_hold_no_copy_of_the_parameters(kind, stacked, monkeypatch):
    block, depth = KINDS[kind]
    layers = {"pattern": (block,), "n_repeats": 4} if stacked else {"pattern": (block,) * 4, "n_repeats": 1}
    model = tiny.build(tiny.config(d_model=64, **layers))
    temporaries = []
    for name in ("read_prompts", "decode_tokens", "speculate"):
        program = getattr(decode, name)

        def measured(*arguments, program=program):
            temporaries.append(program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
            return program(*arguments)

        monkeypatch.setattr(decode, name, measured)
    generate(model, PROMPT, LENGTH, n_new=4, depth=depth)
    assert len(temporaries) == 2
    assert max(temporaries) < 0.1 * sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def test_a_model_taken_apart_is_the_same_function_in_the_same_order():
    model = tiny.build(tiny.config())
    apart = unrolled(model)
    assert apart.config.layers == model.config.layers
    assert (apart.config.n_repeats, len(apart.config.pattern)) == (1, 4)
    tokens = tiny.tokens()
    np.testing.assert_array_equal(apart(tokens), model(tokens))
    assert unrolled(apart) is apart
    fresh = nnx.eval_shape(lambda: type(model)(apart.config, rngs=nnx.Rngs(0)))
    shapes = [
        [(path, v.shape, v.get_metadata()["units"]) for path, v in nnx.to_flat_state(nnx.state(m))]
        for m in (apart, fresh)
    ]
    assert shapes[0] == shapes[1]


def test_donated_stacks_are_freed():
    model = tiny.build(tiny.config())
    logits, stacks = np.asarray(model(tiny.tokens())), jax.tree.leaves(nnx.state(model.blocks))
    apart = unrolled(model, donate=True)
    assert all(leaf.is_deleted() for leaf in stacks)
    np.testing.assert_array_equal(apart(tiny.tokens()), logits)
    assert jnp.isfinite(apart.embedding.table[...]).all()
