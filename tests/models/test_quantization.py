"""Models that are trained for quantisation, and the same ones stored: equal to the bit, on any mesh, with any block."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import LOCAL, PLAIN, build, config, rows, tokens

from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.latency import decode
from efftrain.measure.cost.parameters import cache_bytes_per_token, count_parameters, stored_bytes
from efftrain.models.cache import empty_cache
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.decoding.unrolled import unrolled
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.models.moe import MoE
from efftrain.models.quantization import (
    Packed,
    Quantization,
    QuantizationRule,
    Scale,
    matrices,
    prepare,
    quantized,
    rule_of,
    store,
)
from efftrain.ops.number_formats import Float8, Integer, Ternary
from efftrain.ops.quantize import fake_quantize
from efftrain.sharding.layout import state_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use
from efftrain.train.objectives.objective import SelfDistillation, next_token_loss

INT8, INT4 = Integer(bits=8), Integer(bits=4, group=4)


def weights(format, layers: str = "blocks/.*", **changes) -> Quantization:
    return Quantization(rules=(QuantizationRule(layers=layers, weights=format, **changes),))


def stored_twin(model: Decoder) -> Decoder:
    """What a conversion makes of a model that is trained for quantisation."""
    graph, state = nnx.split(model)
    twin = nnx.merge(graph, jax.tree.map(jnp.copy, state))
    for _, module, name in list(matrices(twin)):
        rule = rule_of(getattr(module, name))
        if rule is not None and rule.weights is not None:
            store(module, name, quantized(module, name))
    return twin


def logits(model: Decoder, batch: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, batch))


def with_block(**changes) -> tuple[BlockConfig, ...]:
    return (replace(PLAIN, **changes),)


MODELS = {
    "int8": config(quantization=weights(INT8)),
    "int4": config(quantization=weights(INT4)),
    "ternary": config(quantization=weights(Ternary(group=4))),
    "float8": config(quantization=weights(Float8())),
    "int8 activations": config(quantization=weights(INT8, activations=INT8)),
    "head": config(quantization=weights(INT4, "head")),
    "tied head": config(quantization=weights(INT8, "blocks/.*"), tied_embedding=True),
    "learned steps": config(quantization=weights(INT4, learned_step=True)),
    "some layers": config(quantization=weights(INT4, "blocks/1/mlp/.*")),
    "scan": config(quantization=weights(INT4), scan=True, remat="full"),
    "bfloat16": config(quantization=weights(INT4), dtype="bfloat16"),
    "experts": config(pattern=with_block(mlp=MoE(n_experts=4, d_expert=8, n_shared=1)), quantization=weights(INT4)),
    "mixture of depths": config(
        pattern=(PLAIN, replace(PLAIN, depth=MixtureOfDepths(capacity=0.5))), quantization=weights(INT4)
    ),
    "recursion": config(
        pattern=(PLAIN, replace(PLAIN, depth=Recursion(shares=(1.0, 0.5)))), n_repeats=1, quantization=weights(INT4)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_stored_model_computes_what_was_trained_to_the_bit(name):
    trained = build(MODELS[name])
    stored = stored_twin(trained)
    np.testing.assert_array_equal(logits(stored, tokens()), logits(trained, tokens()))
    plain = build(MODELS[name].replace(quantization=Quantization()))
    assert np.abs(logits(plain, tokens()) - logits(trained, tokens())).max() > 1e-4
    assert not any(isinstance(v, Packed | Scale) for _, v in nnx.to_flat_state(nnx.state(trained)))
    # The configuration of the stored one builds the same structure.
    twin_config = MODELS[name].replace(quantization=replace(MODELS[name].quantization, stored=True))
    shapes = [nnx.state(m) for m in (stored, nnx.eval_shape(lambda: Decoder(twin_config, rngs=nnx.Rngs(0))))]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])


def test_a_table_is_made_float_row_by_row():
    """Vectors are equal to the bit; what XLA fuses them with rounds once less in one of the programs."""
    trained = build(config(quantization=weights(INT8, "embedding"), tied_embedding=True))
    stored = stored_twin(trained)
    np.testing.assert_array_equal(stored.embedding(tokens()), trained.embedding(tokens()))
    np.testing.assert_array_equal(stored.embedding.as_head(), trained.embedding.as_head())
    np.testing.assert_allclose(logits(stored, tokens()), logits(trained, tokens()), atol=2e-5)


def test_gradients_are_those_at_the_quantised_matrices():
    """By the chain rule through a straight line: a plain model whose matrices have the quantised values."""
    trained = build(config(quantization=weights(INT4)))
    plain = build(config())
    for name, module, attribute in list(matrices(plain)):
        if name.startswith("blocks"):
            variable = getattr(module, attribute)
            variable[...] = fake_quantize(variable[...], INT4, -2)

    def gradient(model):
        graph, params = nnx.split(model, nnx.Param)
        loss = jax.jit(jax.grad(lambda p: next_token_loss(nnx.merge(graph, p), rows(tokens()), None)[0]))
        return jax.tree.leaves(loss(params))

    for found, wanted in zip(gradient(trained), gradient(plain), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=1e-4)


def test_steps_are_learned_and_routers_and_norms_are_not_quantised():
    model = build(MODELS["learned steps"])
    graph, params = nnx.split(model, nnx.Param)
    gradient = jax.grad(lambda p: next_token_loss(nnx.merge(graph, p), rows(tokens()), None)[0])(params)
    ratio = gradient["blocks"][0]["mlp"]["up"]["kernel_step_ratio"][...]
    assert ratio.shape == (2, 4, 24)  # layers, groups of 4 of 16 inputs, outputs
    assert (np.abs(ratio) > 0).all()
    routed = build(MODELS["mixture of depths"])
    assert not [name for name, _, _ in matrices(routed) if "router" in name or "norm" in name]
    assert "blocks/0/mlp/gate" in [name for name, _, _ in matrices(build(MODELS["experts"]))]


def test_distillation_pulls_to_the_float_matrices():
    """Its divergence is KL(float || quantised) by NumPy, and its gradient does not go through the float model."""
    model = build(config(quantization=weights(Ternary(group=4))))
    batch = rows(tokens())
    total, count, metrics = SelfDistillation(weight=2.0)(model, batch, jax.random.key(0))

    def log_p(model):
        return np.asarray(jax.nn.log_softmax(model(batch["tokens"])), np.float64)

    log_student, log_teacher = log_p(model), log_p(build(config()))
    divergence = (np.exp(log_teacher) * (log_teacher - log_student)).sum()
    assert divergence > 0.1
    np.testing.assert_allclose(metrics["loss/divergence"][0], divergence, rtol=1e-4)
    np.testing.assert_allclose(total, metrics["loss"][0] + 2 * divergence, rtol=1e-4)
    assert count == batch["mask"].sum()
    np.testing.assert_allclose(SelfDistillation()(model, batch, None)[0], metrics["loss"][0], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"needs model\.quantization\.rules"):
        SelfDistillation()(build(config()), batch, jax.random.key(0))


@pytest.mark.parametrize("format", [Integer(bits=8), Integer(bits=4)], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_with_a_quantised_cache_is_the_model_that_was_evaluated(format, dtype):
    model = build(config(quantization=Quantization(cache=format), dtype=dtype))
    prompts, lengths = tokens(2, 6), np.array([6, 4])
    drawn = np.asarray(generate(model, prompts, lengths, n_new=6))
    for row, length, new in zip(prompts, lengths, drawn, strict=True):
        text = np.concatenate([row[:length], new])[None]
        seen = logits(model, text)[0, length - 1 : -1]
        chosen = np.take_along_axis(seen, new[:, None], 1)[:, 0]
        assert (seen.max(-1) - chosen).max() <= (1e-4 if dtype == "float32" else 0.1)
    plain = build(config())
    assert np.abs(logits(model, prompts) - logits(plain, prompts)).max() > 1e-4
    # 6 cached heads of d_head 4 and 8 in two kinds of layers: levels, and a scale for each token and head.
    numbers, heads = 2 * 2 * (2 * 4 + 2 * 8), 2 * 2 * (2 + 2)
    assert cache_bytes_per_token(model.config) == numbers * format.bits // 8 + 2 * heads
    assert cache_bytes_per_token(config()) == 4 * numbers


def test_decoding_never_holds_the_float_matrices():
    """XLA's own account of the loop's memory, against that of the float model."""
    wide = replace(PLAIN, mlp=Dense(d_ff=512))
    temporaries, sizes = {}, {}
    for name, quantization in {"float": Quantization(), "int8": weights(INT8), "int4": weights(INT4)}.items():
        model = stored_twin(build(config(pattern=(wide,), n_repeats=8, d_model=64, quantization=quantization)))
        graph, state = nnx.split(unrolled(model))
        arguments = graph, state, jnp.zeros(1, jnp.int32), empty_cache(model.config, 1, 16), 8
        temporaries[name] = decode.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert temporaries["float"] < 0.05 * sizes["float"]
    assert temporaries["int8"] < 0.15 * sizes["float"]
    assert temporaries["int4"] < 0.4 * sizes["float"]


def test_drafts_share_a_quantised_cache():
    model = build(config(pattern=(PLAIN,), n_repeats=4, quantization=Quantization(cache=INT8)))
    prompts, lengths = tokens(2, 6), np.array([6, 4])
    wanted = generate(model, prompts, lengths, n_new=8)
    found = generate(model, prompts, lengths, n_new=8, depth=SelfSpeculation(exit_layer=2, n_draft=3))
    np.testing.assert_array_equal(found, wanted)


def test_a_stored_model_counts_as_what_it_stands_for():
    quantization = weights(INT4)
    plain, stored = build(config()), stored_twin(build(config(quantization=quantization)))
    assert count_parameters(stored) == count_parameters(plain)
    assert training_flops(stored, 16) == training_flops(plain, 16)
    learned = nnx.eval_shape(lambda: Decoder(MODELS["learned steps"], rngs=nnx.Rngs(0)))
    assert training_flops(learned, 16) == training_flops(plain, 16)
    blocks = sum(
        v.size for path, v in nnx.to_flat_state(nnx.state(plain, nnx.Param)) if path[0] == "blocks" and v.ndim == 3
    )
    # Half a byte, and two bytes of scale for every 4 numbers, in place of 4.
    assert stored_bytes(plain) - stored_bytes(stored) == blocks * (4 - 0.5 - 2 / 4)


@pytest.mark.parametrize("name", ["int4", "int8 activations", "experts"])
def test_a_stored_model_is_the_same_on_a_mesh(name):
    """Its packed matrices and scales are split by the same rules."""
    attention = Attention(n_heads=4, n_kv_heads=2, d_head=8, n_blocks=1)
    wide = MODELS[name].replace(
        pattern=tuple(replace(block, attention=attention) for block in MODELS[name].pattern if block != LOCAL),
        n_repeats=2,
        d_model=32,
        vocab_size=32,
    )
    stored = stored_twin(build(wide))
    batch = tokens(8, 12)
    alone = logits(stored, batch)
    graph, state = nnx.split(stored)
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    with use(mesh):
        shardings = state_shardings(state, mesh)
        placed = jax.device_put(state, shardings)
        packed = [v for _, v in nnx.to_flat_state(placed) if isinstance(v, Packed)]
        assert packed
        assert all(len(v[...].sharding.device_set) == 8 and not v[...].is_fully_replicated for v in packed)
        together = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(placed, batch)
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (weights(INT8, "blokcs/.*"), r"rules\[0\].layers is 'blokcs/\.\*', which matches no matrix; they are blocks/0"),
        (
            weights(Integer(bits=4, group=5)),
            r"quantization of blocks/0/attention/key: the group of 5 does not divide 16",
        ),
        (weights(INT8, "embedding", learned_step=True), "learned_step cannot be used for an embedding table"),
    ],
)
def test_what_does_not_fit_is_refused(quantization, message):
    with pytest.raises(ConfigError, match=message):
        Decoder(config(quantization=quantization), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizationRule(weights=INT8, activations=INT4), "activations have one scale per token"),
        (lambda: QuantizationRule(learned_step=True), "learned_step needs weights of an integer format"),
        (lambda: QuantizationRule(weights=Float8(), learned_step=True), "learned_step needs weights"),
        (lambda: Quantization(cache=INT4), "the cache has one scale for each token and head"),
        (lambda: weights(INT8, "("), "is not a regular expression"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_first_rule_that_matches_counts():
    first = QuantizationRule(layers=".*/down", weights=INT8)
    second = QuantizationRule(layers="blocks/.*", weights=INT4)
    model = build(config())
    prepare(model, Quantization(rules=(first, second)))
    rules = {name: rule_of(getattr(module, attribute)) for name, module, attribute in matrices(model)}
    assert rules["blocks/0/mlp/down"] == first
    assert rules["blocks/1/attention/out"] == second
    assert rules["embedding"] is None


def test_dense_models_take_forks_of_their_own():
    """A product that a fork makes of a ``Linear`` is quantised like any other."""
    block = BlockConfig(attention=PLAIN.attention, mlp=Dense(d_ff=8))
    model = ModelConfig(
        vocab_size=29, d_model=16, pattern=(block,), n_repeats=1, max_length=24, quantization=weights(INT4, ".*/mlp/.*")
    )
    trained = build(model)
    np.testing.assert_array_equal(logits(stored_twin(trained), tokens()), logits(trained, tokens()))
