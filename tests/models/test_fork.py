"""A researcher's own feed-forward layer plugs in, and nothing under efftrain changes."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.config import from_json, to_json
from efftrain.models.config import BlockConfig, MlpConfig
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Linear
from efftrain.ops.cross_entropy import cross_entropy


@dataclass(frozen=True, kw_only=True)
class SquaredReLU(MlpConfig):
    """``down(relu(up(x)) ** 2)``. So et al. 2021 (Primer)."""

    d_ff: int

    def build(self, d_model, *, n_layers, dtype, rngs):
        return SquaredReLULayer(d_model, self.d_ff, dtype=dtype, rngs=rngs)


class SquaredReLULayer(nnx.Module):
    def __init__(self, d_model, d_ff, *, dtype, rngs):
        self.up = Linear(d_model, d_ff, axes=("embed", "mlp"), dtype=dtype, rngs=rngs)
        self.down = Linear(d_ff, d_model, axes=("mlp", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x_btd):
        hidden_btf = jax.nn.relu(self.up(x_btd)) ** 2
        return self.down(hidden_btf), {"mlp/active": ((hidden_btf > 0).sum(dtype=jnp.float32), float(hidden_btf.size))}


FORKED = BlockConfig(attention=tiny.PLAIN.attention, mlp=SquaredReLU(d_ff=32))


def test_a_forked_layer_trains_beside_the_given_ones():
    """Its weights move by one step of descent, the loss falls, and its metric comes out once a layer."""
    graph, params = nnx.split(tiny.build(tiny.config(pattern=(FORKED, tiny.LOCAL), scan=True)))
    tokens, targets = tiny.tokens(), tiny.tokens(seed=1)

    def loss(params):
        model = nnx.merge(graph, params)
        hidden, metrics = model.hidden(tokens)
        return cross_entropy(hidden, model.head_kernel(), targets, np.ones(tokens.shape)) / tokens.size, metrics

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (before, metrics), gradients = step(params)
    moved = optax.apply_updates(params, jax.tree.map(lambda g: -0.05 * g, gradients))
    (after, _), _ = step(moved)
    assert after < before - 0.01
    assert np.abs(gradients["blocks"][0]["mlp"]["up"]["kernel"][...]).max(axis=(1, 2)).min() > 1e-4
    active, count = metrics["mlp/active"]
    assert count == 2 * tokens.size * 32
    assert 0.2 < active / count < 0.8


def test_a_forked_layer_computes_its_formula():
    model = nnx.merge(*nnx.split(SquaredReLULayer(4, 6, dtype="float32", rngs=nnx.Rngs(0))))
    x = np.random.default_rng(0).normal(size=(1, 3, 4)).astype(np.float32)
    expected = np.maximum(x @ model.up.kernel[...], 0) ** 2 @ model.down.kernel[...]
    np.testing.assert_allclose(model(x)[0], expected, atol=1e-6)


def test_a_forked_configuration_survives_json():
    config = tiny.config(pattern=(FORKED, tiny.LOCAL))
    assert from_json(to_json(config)) == config
    assert isinstance(from_json(to_json(config)).pattern[0].mlp, SquaredReLU)


def test_a_configuration_without_build_says_so():
    config = tiny.config(pattern=(BlockConfig(attention=tiny.PLAIN.attention, mlp=MlpConfig()),))
    with pytest.raises(TypeError, match="MlpConfig has no build method"):
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
