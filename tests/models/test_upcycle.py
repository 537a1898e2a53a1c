"""A dense model as a mixture: the same function, then another one."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_models import PLAIN, build, config, tokens

from efftrain.errors import ConfigError
from efftrain.models.config import BlockConfig, Dense
from efftrain.models.decoder import Decoder
from efftrain.models.moe import MoE
from efftrain.models.moe.upcycle import upcycle
from efftrain.models.norms import LayerNorm
from efftrain.models.residual import PostNorm

DENSE = config(pattern=(PLAIN,), n_repeats=4, tied_embedding=False)
ROUTED = MoE(n_experts=4, top_k=2, d_expert=PLAIN.mlp.d_ff)


def with_mlps(*mlps, **changes):
    pattern = tuple(BlockConfig(attention=PLAIN.attention, mlp=mlp) for mlp in mlps)
    return DENSE.replace(pattern=pattern, n_repeats=4 // len(pattern), **changes)


@pytest.mark.parametrize("mlps", [(ROUTED,), (PLAIN.mlp, ROUTED)], ids=["every layer", "every second layer"])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_the_mixture_computes_what_the_dense_model_does(mlps, scores):
    mlps = tuple(replace(mlp, scores=scores) if isinstance(mlp, MoE) else mlp for mlp in mlps)
    dense = build(DENSE)
    routed = upcycle(dense, with_mlps(*mlps), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(routed(tokens()), dense(tokens()), atol=2e-5, rtol=1e-5)
    assert routed.config.pattern[-1].mlp.n_experts == 4


def test_a_dense_model_with_learned_positions_and_a_head_bias():
    fields = {"learned_positions": True, "head_bias": True, "norm": LayerNorm(), "logit_softcap": 2.0}
    dense = build(DENSE.replace(n_repeats=1, **fields))
    routed = upcycle(dense, DENSE.with_blocks(mlp=ROUTED).replace(n_repeats=1, **fields), rngs=nnx.Rngs(0))
    np.testing.assert_allclose(routed(tokens()), dense(tokens()), atol=2e-5, rtol=1e-5)


def test_an_ungated_dense_model_is_refused():
    dense = build(DENSE.with_blocks(mlp=replace(PLAIN.mlp, gated=False)))
    with pytest.raises(ConfigError, match="layer 0: experts are SwiGLU without biases"):
        upcycle(dense, with_mlps(ROUTED), rngs=nnx.Rngs(0))


def test_experts_part_when_trained():
    """Copies see different tokens, so their gradients differ."""
    routed = upcycle(build(DENSE), with_mlps(ROUTED), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(routed, nnx.Param, ...)
    gradient = jax.grad(lambda p: nnx.merge(graph, p, rest)(tokens()).var())(params)
    gate = gradient["blocks"][0]["mlp"]["gate"][...]
    assert np.abs(gate[:, 0] - gate[:, 1]).max() > 1e-6
    assert np.abs(gradient["blocks"][0]["mlp"]["router"][...]).max() == pytest.approx(0, abs=1e-6)  # equal experts


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (with_mlps(replace(ROUTED, d_expert=12)), r"layer 0: moe\.d_expert is 12 and the dense model's d_ff 24"),
        (with_mlps(ROUTED, d_model=32), r"model\.d_model is 32 and the dense model has 16"),
        (with_mlps(replace(ROUTED, top_k=1)), r"layer 0: upcycling needs gates that sum to 1"),
        (with_mlps(replace(ROUTED, n_shared=1)), r"layer 0: upcycling needs gates that sum to 1"),
        (with_mlps(ROUTED, Dense(d_ff=8)), r"layer 1: mlp is neither"),
        (
            DENSE.replace(pattern=(replace(PLAIN, attention=replace(PLAIN.attention, window=3)),)),
            r"layer 0: attention differs",
        ),
        (with_mlps(ROUTED, norm=LayerNorm()), r"model\.norm is LayerNorm\(bias=True\) and the dense model has RMS"),
        (
            with_mlps(ROUTED, residual_multiplier=0.5),
            r"model\.residual_multiplier is 0\.5 and the dense model has 1\.0",
        ),
        (DENSE.with_blocks(mlp=ROUTED, residual=PostNorm()), r"layer 0: the residual form differs"),
    ],
)
def test_a_mixture_of_another_shape_is_refused(target, message):
    with pytest.raises(ConfigError, match=message):
        upcycle(build(DENSE), target, rngs=nnx.Rngs(0))


def test_only_a_dense_model_is_upcycled():
    with pytest.raises(ConfigError, match="layer 0: the model to upcycle has MoE there"):
        upcycle(Decoder(with_mlps(ROUTED), rngs=nnx.Rngs(0)), with_mlps(ROUTED), rngs=nnx.Rngs(0))
