"""Modified scores against NumPy, with documents, windows and a mesh; what cannot take them; what is not counted."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.models.components import MlpConfig, ScoreModConfig
from efftrain.models.config import Attention
from efftrain.models.decoder import abstract_decoder
from efftrain.ops.attention import causal_attention
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use


@dataclass(frozen=True, kw_only=True)
class Learned(ScoreModConfig):
    """A slope for each head, which is trained."""

    def build(self, attention, model, *, rngs):
        return Slopes(attention.n_heads)


class Slopes(nnx.Module):
    def __init__(self, n):
        self.slope = nnx.Param(0.1 * jnp.arange(1.0, n + 1), axes=(None,), units=(n,))

    def __call__(self, scores_bhts, heads_h, queries_bt, keys_bs):
        distance_bts = queries_bt[:, :, None] - keys_bs[:, None]
        return 5 * jnp.tanh(scores_bhts / 5) - self.slope[...][heads_h][:, None, None] * distance_bts[:, None]


@pytest.mark.parametrize("n_blocks", [1, 3])
def test_scores_are_modified_before_the_mask(n_blocks):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 11, n, 4)).astype(np.float32) for n in (4, 2, 2))
    slopes, window = np.array([0.1, 0.2, 0.3, 0.4]), 3
    modify = partial(Slopes(4), heads_h=jnp.arange(4))
    out = causal_attention(
        q, k, v, segments_bs=tiny.SEGMENTS, window=window, n_blocks=n_blocks, positions_bs=tiny.POSITIONS,
        score_mod=lambda scores, queries, keys: modify(scores, queries_bt=queries, keys_bs=keys),
    )  # fmt: skip
    for b, t, h in np.ndindex(2, 11, 4):
        seen = [s for s in range(max(0, t - window + 1), t + 1) if tiny.SEGMENTS[b, s] == tiny.SEGMENTS[b, t]]
        raw = np.array([q[b, t, h] @ k[b, s, h // 2] / 2 for s in seen])
        raw = 5 * np.tanh(raw / 5) - slopes[h] * (tiny.POSITIONS[b, t] - tiny.POSITIONS[b, seen])
        weights = np.exp(raw) / np.exp(raw).sum()
        np.testing.assert_allclose(out[b, t, h], weights @ v[b, seen, h // 2], atol=1e-5)


@pytest.mark.parametrize("changed", [{"score_mod": Learned()}, {"sinks": True}], ids=["score_mod", "sinks"])
def test_a_mesh_that_splits_rows_heads_and_tokens_gives_the_same_with_its_gradient(changed):
    attention = Attention(n_heads=4, n_kv_heads=2, d_head=4, n_blocks=1, **changed)
    model = tiny.build(tiny.config(pattern=(replace(tiny.PLAIN, attention=attention),), n_repeats=1))
    graph, state = nnx.split(model)
    tokens = tiny.tokens(2, 12)

    def loss(state):
        return (nnx.merge(graph, state)(tokens) ** 2).sum()

    alone = jax.jit(jax.value_and_grad(loss))(state)
    with use(make_mesh(MeshConfig(fsdp=2, context=2, tensor=2))):
        split = jax.jit(jax.value_and_grad(loss))(state)
    (name,) = changed
    assert np.abs(jax.tree.leaves(alone[1]["blocks"][0]["attention"][name])[0]).max() > 1e-3
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(split), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3 * float(np.abs(a).max()))


@pytest.mark.parametrize("backend", ["splash", "cudnn"])
@pytest.mark.parametrize("changed", [{"score_mod": Learned()}, {"sinks": True}], ids=["score_mod", "sinks"])
def test_a_kernel_that_is_asked_for_by_name_refuses(backend, changed):
    (name,) = changed
    with pytest.raises(ConfigError, match=rf"cannot take attention\.{name}"):
        Attention(n_heads=2, n_kv_heads=2, d_head=4, backend=backend, **changed)


@dataclass(frozen=True, kw_only=True)
class Gram(MlpConfig):
    """Products that belong to no parameter."""

    loop: bool = False

    def build(self, d_model, *, n_layers, dtype, rngs):
        return GramOf(self.loop)


class GramOf(nnx.Module):
    def __init__(self, loop):
        self.loop = loop

    def __call__(self, x_btd):
        def product(x):
            return jnp.einsum("btd,bsd,bse->bte", x, x, x, optimize=[(0, 1), (0, 1)])

        return (jax.lax.while_loop(lambda x: x.sum() > 0, product, x_btd) if self.loop else product(x_btd)), {}


def test_products_of_no_parameter_are_counted_or_refused():
    def flops(mlp):
        return training_flops(abstract_decoder(tiny.config(pattern=(replace(tiny.PLAIN, mlp=mlp),))), 12)

    dense, length, d = flops(tiny.PLAIN.mlp) - 3 * 2 * 6 * 16 * 24, 12, 16
    assert flops(Gram()) - dense == pytest.approx(3 * 2 * 4 * length * d)
    with pytest.raises(ConfigError, match="Gram cannot be counted, as it computes a loop of unknown length"):
        flops(Gram(loop=True))
