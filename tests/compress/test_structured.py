"""Structured pruning: what is measured, what is sliced, what is left, what is refused."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import LOCAL, PLAIN, build, config, tokens

from efftrain.compress.layerwise.calibration import CalibrationRows, forward
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.structured.cut import kept_layers, largest, structured_prune
from efftrain.compress.structured.importance import _observe, importance
from efftrain.compress.structured.shape import Shape, head_parts, shaped
from efftrain.compress.structured.shape_count import Count
from efftrain.compress.structured.shapes import candidates
from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.parameters import count_parameters, stored_bytes
from efftrain.models.config import Dense, LayerDropout, MlpConfig, ModelConfig, llama
from efftrain.models.decoder import abstract_decoder
from efftrain.models.decoding.generate import generate
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.models.linear import Linear
from efftrain.models.moe.layer import MoE, RoutedExperts
from efftrain.models.norms import RMS
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.residual import PostNorm
from efftrain.ops.number_formats import Integer
from efftrain.ops.routing import route

GQA = replace(LOCAL, attention=replace(LOCAL.attention, n_heads=4, d_head=4))
ONE_GROUP = replace(PLAIN, attention=replace(PLAIN.attention, n_kv_heads=1))
ROUTED = replace(PLAIN, mlp=MoE(n_experts=4, d_expert=8, n_shared=1))
MODELS = {
    "two kinds": config(pattern=(PLAIN, GQA)),
    "two kinds, scan": config(pattern=(PLAIN, GQA), scan=True, n_repeats=3),
    "tied, layers left out": config(pattern=(PLAIN, GQA), tied_embedding=True, layer_dropout=LayerDropout(rate=0.1)),
    "experts": config(pattern=(PLAIN, ROUTED), n_repeats=2),
    "biases and no gate": config(
        pattern=(
            replace(
                PLAIN,
                attention=replace(PLAIN.attention, qkv_bias=True, out_bias=True),
                mlp=Dense(d_ff=24, activation="gelu", gated=False, bias=True),
            ),
        ),
        learned_positions=True,
        head_bias=True,
        logit_softcap=5.0,
        n_repeats=3,
    ),
    "one KV head": config(pattern=(ONE_GROUP, GQA), n_repeats=2),
    "sinks": config(pattern=tuple(replace(b, attention=replace(b.attention, sinks=True)) for b in (ONE_GROUP, GQA))),
}


def logits(model, batch: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, batch))


def calibration(n: int = 8, length: int = 16) -> CalibrationRows:
    """Two documents a row, and padding behind the second one, in each row of another length."""
    place = np.arange(length)[None]
    end, cut = 9 + np.arange(n)[:, None] % 8, 3 + np.arange(n)[:, None] % 4
    segments = np.where(place >= end, 0, 1 + (place >= cut))
    positions = np.where(place >= cut, place - cut, place)
    return CalibrationRows(tokens(n, length, seed=3), segments.astype(np.int32), positions.astype(np.int32))


def walk(pieces: LayerwiseModel, text: CalibrationRows) -> list[np.ndarray]:
    """The residual stream before each layer and behind the last one, without what is padding: zero there."""
    x = np.asarray(pieces.outer.embedding(text.tokens))
    found = [x]
    for layer in pieces.layers:
        found.append(forward(layer, found[-1], text))
    return found


def row_norm(a_ntd: np.ndarray, text: CalibrationRows) -> np.ndarray:
    """The formula of Minitron, row by row."""
    rows = [np.abs(a_td[real]).mean(0) for a_td, real in zip(np.asarray(a_ntd), text.segments > 0, strict=True)]
    return np.sqrt(np.square(rows).sum(0))


def whole(model_config, **changes) -> Shape:
    return replace(Shape.of(model_config), **changes)


def smaller_model(model, text: CalibrationRows | None = None, **changes):
    pieces = LayerwiseModel.of(model)
    return structured_prune(pieces, whole(model.config, **changes), importance(pieces, text or calibration()))


def test_importance_is_the_formula_on_tokens_that_are_no_padding():
    model, text = build(config(pattern=(PLAIN, ROUTED), n_repeats=1)), calibration()
    pieces = LayerwiseModel.of(model)
    found = importance(pieces, text)
    streams, hidden = walk(pieces, text), np.zeros(16)
    for i, layer in enumerate(pieces.layers):
        x = streams[i]
        middle = x + layer.attention(layer.attention_norm(x), text.positions, text.segments)
        read = layer.mlp_norm(middle)
        hidden += row_norm(layer.attention_norm(x), text) + row_norm(read, text)
        layer.attention.out.kernel[...] = jnp.eye(16)  # so that attention gives what the product reads
        columns = row_norm(layer.attention(layer.attention_norm(x), text.positions, text.segments), text)
        np.testing.assert_allclose(found.heads[i], np.sqrt(np.square(columns).reshape(2, 8).sum(1)), rtol=1e-4)
        real = text.segments > 0
        moments = {"attention_norm": x, "mlp_norm": middle}
        for name, seen in moments.items():
            expected = np.square(np.asarray(seen)[real]).mean(0)
            np.testing.assert_allclose(found.moments[f"blocks/{i}/{name}"], expected, rtol=1e-4)
        if isinstance(layer.mlp, RoutedExperts):
            expected = gate_times_norm(layer.mlp, np.asarray(read)[real])
            np.testing.assert_allclose(found.experts[i], expected, rtol=1e-4)
            assert found.ffn[i] is None
        else:
            units = jax.nn.silu(layer.mlp.gate(read)) * layer.mlp.up(read)
            np.testing.assert_allclose(found.ffn[i], row_norm(units, text), rtol=1e-4)
            assert found.experts[i] is None
    hidden += row_norm(pieces.outer.norm(streams[-1]), text)
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-4)


def gate_times_norm(mlp: RoutedExperts, x_nd: np.ndarray) -> np.ndarray:
    """(experts,) by a loop over tokens."""
    settings = {"top_k": 2, "scores": "softmax", "renormalize": True}
    routing = route(x_nd @ mlp.router[...], mlp.bias[...], **settings)
    gate, up, down = (np.asarray(getattr(mlp, name)[...]) for name in ("gate", "up", "down"))
    total = np.zeros(4)
    for x_d, experts, gates in zip(x_nd, np.asarray(routing.experts_nk), np.asarray(routing.gates_nk), strict=True):
        for e, g in zip(experts, gates, strict=True):
            before = x_d @ gate[e]
            total[e] += np.linalg.norm(g * (before / (1 + np.exp(-before)) * (x_d @ up[e])) @ down[e])
    return total / len(x_nd)


@pytest.mark.parametrize("n", [1, 2])
def test_the_influence_of_a_block_is_how_far_it_turns_the_stream(n):
    model, text = build(MODELS["two kinds"]), calibration()
    pieces = LayerwiseModel.of(model)
    found, streams = importance(pieces, text), walk(pieces, text)
    for first in range(5 - n):
        a, b = (x[text.segments > 0] for x in (streams[first], streams[first + n]))
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert found.block_influence(first, n) == pytest.approx(1 - cosine.mean(), rel=1e-4)


def test_a_pass_compiles_each_kind_of_layer_once_and_leaves_the_model_as_it_was():
    model = build(config(n_repeats=4, norm_eps=1e-4))  # an eps of its own: another compiled program
    pieces, before = LayerwiseModel.of(model), _observe._cache_size()
    found = importance(pieces, calibration(16))
    assert _observe._cache_size() - before == 2
    again = assemble(model.config, pieces.outer, [nnx.state(layer) for layer in pieces.layers])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    # Rows of padding only, in a batch that is not full, count nothing.
    text = calibration(16)
    more = {"tokens": 3, "segments": 0, "positions": 0}
    padded = CalibrationRows(
        **{k: np.pad(getattr(text, k), ((0, 3), (0, 0)), constant_values=v) for k, v in more.items()}
    )
    np.testing.assert_allclose(importance(pieces, padded).hidden, found.hidden, rtol=1e-5)


def zeroed(model, report):
    """The whole model with nothing behind the units and groups that the report has not kept."""
    pieces = LayerwiseModel.of(model)
    for cut, layer in zip(report.layers, pieces.layers, strict=True):
        n = 16 // head_parts(layer.attention.config)
        kept = {layer.attention.out: np.concatenate([np.arange(g * n, (g + 1) * n) for g in cut.heads])}
        if cut.ffn is not None:
            kept[layer.mlp.down] = np.array(cut.ffn)
        for linear, rows in kept.items():
            kernel = np.asarray(linear.kernel[...])
            assert 0 < len(rows) < len(kernel)
            linear.kernel[...] = jnp.asarray(np.where(np.isin(np.arange(len(kernel)), rows)[:, None], kernel, 0))
    return assemble(model.config, pieces.outer, [nnx.state(layer) for layer in pieces.layers])


@pytest.mark.parametrize(
    "name", ["two kinds, scan", "tied, layers left out", "experts", "one KV head", "biases and no gate", "sinks"]
)
def test_slicing_is_zeroing(name):
    model = build(MODELS[name])
    smaller, report = smaller_model(model, ffn=0.5, heads=0.5)
    expected = logits(zeroed(model, report), tokens())
    np.testing.assert_allclose(logits(smaller, tokens()), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - logits(model, tokens())).max() > 1e-2
    assert smaller.config.n_repeats == model.config.n_repeats
    assert smaller.config.scan == model.config.scan


def test_with_one_kv_head_the_query_heads_that_do_least_go():
    """By the formula, head by head; key and value stay as they are."""
    model, text = build(config(pattern=(ONE_GROUP,), n_repeats=1)), calibration()
    smaller, report = smaller_model(model, heads=0.75)
    (layer,) = LayerwiseModel.of(model).layers
    layer.attention.out.kernel[...] = jnp.eye(16)
    read = layer.attention_norm(np.asarray(model.embedding(text.tokens)))
    columns = row_norm(layer.attention(read, text.positions, text.segments), text)
    of_heads = np.square(columns).reshape(4, 4).sum(1)
    assert report.layers[0].heads == tuple(sorted(np.argsort(-of_heads)[:3]))
    attention = smaller.config.pattern[0].attention
    assert (attention.n_heads, attention.n_kv_heads) == (3, 1)
    for name in ("key", "value"):
        whole_kernel = getattr(model.blocks[0].attention, name).kernel[...]
        np.testing.assert_array_equal(getattr(smaller.blocks[0].attention, name).kernel[...], whole_kernel)
    found = candidates(model.config, 0.4, axis="width", metric="flops", length=16)
    assert min(shape.heads for shape in found) < 1


ADVISED = {
    "one query head": config(pattern=(replace(PLAIN, attention=replace(PLAIN.attention, n_heads=1, n_kv_heads=1)),)),
    "one KV head": config(pattern=(ONE_GROUP,)),
    "two KV heads": config(pattern=(PLAIN, ROUTED)),
    "layers of 24 and 12 units": config(),
    "experts": config(pattern=(replace(ROUTED, mlp=MoE(n_experts=6, top_k=5, d_expert=8)),)),
}


@pytest.mark.parametrize("name", ADVISED)
def test_a_share_cuts_or_is_refused_with_one_that_does(name):
    """No shape is accepted that leaves everything, and whoever follows the advice gets a smaller model."""
    model_config, advice = ADVISED[name], []
    kinds = {"ffn": Dense, "experts": MoE}
    there = [f for f, kind in kinds.items() if any(isinstance(b.mlp, kind) for b in model_config.pattern)]

    def cut(field: str, share: float) -> ModelConfig:
        return shaped(model_config, whole(model_config, **{field: share}), range(model_config.n_layers))

    for field in ("heads", *there):
        for share in (0.01, 0.1, 0.2, 0.26, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.99):
            try:
                assert cut(field, share) != model_config
            except ConfigError as error:
                found = re.search(rf"shape\.{field} is .*; (?:use|leave it at) ([\d.]+)$", str(error))
                advice.append(float(found[1]))
                assert (advice[-1] == 1) == (cut(field, advice[-1]) == model_config)
    assert advice
    assert (1 in advice) == (name == "one query head")


def test_experts_that_no_token_goes_to_are_not_missed():
    model = build(config(pattern=(PLAIN, ROUTED), n_repeats=2))
    model.blocks[1].mlp.bias[...] = jnp.array([[0, -1e3, 0, -1e3], [-1e3, 0, -1e3, 0]], jnp.float32)
    smaller, report = smaller_model(model, experts=0.5)
    assert [cut.experts for cut in report.layers] == [None, (0, 2), None, (1, 3)]
    np.testing.assert_allclose(logits(smaller, tokens()), logits(model, tokens()), rtol=1e-5, atol=1e-5)
    mlp = smaller.blocks[1].mlp
    assert mlp.router[...].shape == (2, 16, 2)
    assert mlp.gate[...].shape == (2, 2, 16, 8)
    assert mlp.bias[...].shape == mlp.starved[...].shape == (2, 2)
    assert mlp.shared.up.kernel[...].shape == (2, 16, 8)


def test_what_is_large_stays_and_what_is_dead_goes():
    model = build(config(pattern=(PLAIN,), n_repeats=1))
    stack = model.blocks[0]
    dead, large = [3, 20], 11
    stack.mlp.up.kernel[...] = stack.mlp.up.kernel[...].at[..., dead].set(0).at[..., large].multiply(100)
    stack.attention.value.kernel[...] = stack.attention.value.kernel[...].at[..., :4].set(0)  # group 0
    for norm in (stack.attention_norm, stack.mlp_norm, model.norm):
        norm.scale[...] = norm.scale[...].at[..., [0, 15]].set(0)
    _, report = smaller_model(model, ffn=16 / 24, heads=0.5, d_model=8)
    (cut,) = report.layers
    assert cut.heads == (1,)
    assert large in cut.ffn
    assert not set(dead) & set(cut.ffn)
    assert not {0, 15} & set(report.hidden)
    assert list(cut.ffn) == sorted(cut.ffn)
    assert list(report.hidden) == sorted(report.hidden)


def test_of_equal_ones_the_first_stay():
    np.testing.assert_array_equal(largest(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 3), [0, 1, 3])


def test_channels_that_carry_nothing_are_not_missed():
    """Norms divide by the root mean square of half the channels; their scales make up for it."""
    model = build(config(pattern=(PLAIN, ROUTED), n_repeats=2, norm_eps=1e-12))
    empty = [0, 2, 3, 6, 9, 12, 13, 14]
    columns = [model.embedding.table]
    for stack in model.blocks:
        columns += [stack.attention.out.kernel]
        columns += [stack.mlp.down, stack.mlp.shared.down.kernel] if isinstance(stack.mlp, RoutedExperts) else [
            stack.mlp.down.kernel
        ]  # fmt: skip
    for variable in columns:
        variable[...] = variable[...].at[..., empty].set(0)
    smaller, report = smaller_model(model, d_model=8)
    assert set(report.hidden) == set(range(16)) - set(empty)
    np.testing.assert_allclose(logits(smaller, tokens()), logits(model, tokens()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        smaller.norm.scale[...], np.asarray(model.norm.scale[...])[list(report.hidden)] * 2**-0.5 * 2, rtol=1e-5
    )


@pytest.mark.parametrize("scan", [False, True])
def test_layers_that_do_nothing_are_not_missed(scan):
    model = build(config(pattern=(PLAIN, GQA), n_repeats=3, scan=scan))
    for position, repeat in ((1, 1), (0, 2)):  # the layers 3 and 4
        stack = model.blocks[position]
        for kernel in (stack.attention.out.kernel, stack.mlp.down.kernel):
            kernel[...] = kernel[...].at[repeat].set(0)
    smaller, report = smaller_model(model, n_layers=4)
    assert report.dropped == (3, 4)
    assert [cut.layer for cut in report.layers] == [0, 1, 2, 5]
    assert (len(smaller.config.pattern), smaller.config.n_repeats, smaller.config.scan) == (2, 2, scan)
    np.testing.assert_allclose(logits(smaller, tokens()), logits(model, tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n_dropped", "dropped"), [(1, [2]), (2, [2, 3]), (3, [2, 3, 4]), (4, [1, 2, 3, 4])])
def test_layers_go_in_one_block_between_the_first_and_the_last(n_dropped, dropped):
    """These two do next to nothing here, and stay."""
    found = importance(LayerwiseModel.of(build(config(pattern=(PLAIN,), n_repeats=6))), calibration())
    turned = np.cumsum([0, 0.001, 0.3, 0.05, 0.1, 0.15, 0.001])
    found = replace(found, cosines=1 - np.abs(turned - turned[:, None]))
    assert sorted(set(range(6)) - set(kept_layers(found, 6 - n_dropped))) == dropped


@pytest.mark.parametrize(
    ("pattern", "kept", "period"),
    [
        ((PLAIN,), (0, 1, 4, 5), 1),
        ((PLAIN, GQA), (0, 1, 4, 5), 2),
        ((PLAIN, GQA), (0, 1, 3, 4, 5), 5),
        ((PLAIN, GQA), (0, 1, 2, 5), 2),
        ((PLAIN, PLAIN, GQA), (0, 2, 3, 5), 2),
    ],
)
def test_the_pattern_is_the_shortest(pattern, kept, period):
    model_config = config(pattern=pattern, n_repeats=6 // len(pattern), scan=True)
    new = shaped(model_config, whole(model_config, n_layers=len(kept)), kept)
    assert len(new.pattern) == period
    assert new.layers == tuple(model_config.layers[i] for i in kept)
    assert new.scan


@pytest.mark.parametrize("name", ["two kinds, scan", "experts", "biases and no gate"])
def test_a_smaller_model_draws_what_its_whole_rows_say(name):
    model = build(MODELS[name])
    smaller, report = smaller_model(model, d_model=8, ffn=0.5, heads=0.5, n_layers=model.config.n_layers - 1)
    assert smaller.config == shaped(model.config, whole(model.config, d_model=8, ffn=0.5, heads=0.5,
        n_layers=model.config.n_layers - 1), [cut.layer for cut in report.layers])  # fmt: skip
    prompts = tokens(2, 6)
    drawn = np.asarray(generate(smaller, prompts, np.full(2, 6), n_new=5))
    rows = np.concatenate([prompts, drawn], 1)
    np.testing.assert_array_equal(drawn, logits(smaller, rows)[:, 5:-1].argmax(-1))


def test_the_report_says_what_was_kept_and_what_it_saves():
    model = build(MODELS["experts"])
    smaller, report = smaller_model(model, d_model=8, ffn=0.5, heads=0.5, experts=0.5, n_layers=3)
    for size, of in ((report.before, model), (report.after, smaller)):
        assert size.parameters == count_parameters(of).total
        assert size.bytes == stored_bytes(of)
        assert size.training_flops == training_flops(of, 16)
    assert (report.length, len(report.hidden), len(report.dropped)) == (16, 8, 1)
    assert [cut.experts is None for cut in report.layers] == [cut.ffn is not None for cut in report.layers]
    assert json.loads(json.dumps(report.as_json()))["after"]["parameters"] < 0.6 * report.before.parameters


def test_a_bfloat16_model_is_measured_and_cut():
    model = build(config(pattern=(PLAIN,), dtype="bfloat16"))
    smaller, _ = smaller_model(model, d_model=8, ffn=0.5)
    assert np.isfinite(logits(smaller, tokens())).all()


class Odd(MlpConfig):
    """A fork's layer, whose axis has the name of hidden channels and is none."""

    def build(self, d_model, *, n_layers, dtype, rngs):
        return OddLayer(d_model, dtype=dtype, rngs=rngs)


class OddLayer(nnx.Module):
    def __init__(self, d_model, *, dtype, rngs):
        self.up = Linear(d_model, 16, axes=("embed", "norm"), dtype=dtype, rngs=rngs)
        self.down = Linear(16, d_model, axes=("norm", "embed"), dtype=dtype, rngs=rngs)

    def __call__(self, x_btd):
        return self.down(self.up(x_btd)), {}


INT4 = QuantizationRule(weights=Integer(bits=4))
REFUSED = [
    ({}, {"d_model": 24}, r"shape\.d_model is 24 and the model has 16; give at most 16"),
    ({}, {"d_model": 13}, r"shape\.d_model is 13, which rounds to all 16 channels; use 8"),
    ({}, {"d_model": 3}, r"shape\.d_model is 3, less than half a multiple of 8; use 8"),
    ({}, {"n_layers": 5}, r"shape\.n_layers is 5 and the model has 4; give at most 4"),
    ({}, {"n_layers": 1}, r"shape\.n_layers is 1 of 4, and the first and the last layer are never removed; keep"),
    ({"n_repeats": 1}, {"n_layers": 1}, r"shape\.n_layers is 1 of 2.*keep at least 2"),
    ({}, {"ffn": 0.3}, r"shape\.ffn is 0\.3, which leaves layer 1 none of its 12 units; use 0\.334"),
    ({}, {"heads": 0.1}, r"shape\.heads is 0\.1, which leaves layer 0 none of its 2 KV groups; use 0\.5"),
    ({}, {"experts": 0.5}, r"shape\.experts is 0\.5 and no layer has MoE; leave it at 1"),
    ({"pattern": (ROUTED,)}, {"ffn": 0.5}, r"shape\.ffn is 0\.5 and no layer has Dense; leave it at 1"),
    ({"pattern": (replace(PLAIN, mlp=Odd()),)}, {"d_model": 8}, r"blocks/0/mlp/.*logical names"),
    (
        {"quantization": Quantization(rules=(replace(INT4, layers="blocks/1/.*"),))},
        {"n_layers": 3},
        "gives layer . another rule when layers are dropped",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "shape", "message"), REFUSED)
def test_shapes_that_do_not_fit_are_refused(changes, shape, message):
    model = build(config(**changes))
    with pytest.raises(ConfigError, match=message):
        smaller_model(model, **shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn": 0.0}, r"shape\.ffn is 0\.0; give a share above 0 and at most 1"),
        ({"heads": 1.5}, r"shape\.heads is 1\.5; give a share"),
        ({"n_layers": 0}, r"shape\.n_layers is 0; keep at least 1"),
    ],
)
def test_impossible_shares_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        whole(config(), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": Quantization(rules=(INT4,), stored=True)}, "is converted already; prune the one"),
        ({"quantization": Quantization(rules=(replace(INT4, learned_step=True),))}, "learned_step"),
        ({"pattern": (PLAIN, replace(PLAIN, depth=MixtureOfDepths(capacity=0.5)))}, "layer 1 has .* MixtureOfDepths"),
        ({"pattern": (replace(PLAIN, depth=Recursion(shares=(1.0, 0.5))),)}, "layer 0 has .* Recursion"),
        (
            {"norm": RMS(zero_centered=True)},
            r"model.norm is RMS\(zero_centered=True\), whose .* prune a model with RMS",
        ),
        ({"pattern": (replace(PLAIN, residual=PostNorm()),)}, "layer 0 has PostNorm, .* Attention, Rotary and PreNorm"),
        (
            {"pattern": (replace(PLAIN, attention=replace(PLAIN.attention, qk_norm="full")),)},
            "layer 0 has attention.qk_norm 'full', a norm over all heads",
        ),
    ],
)
def test_models_that_cannot_be_pruned_are_refused(changes, message):
    model_config = config(**changes)
    pieces = LayerwiseModel.of(build(model_config))
    with pytest.raises(ConfigError, match=message):
        importance(pieces, calibration())
    with pytest.raises(ConfigError, match=message):
        candidates(model_config, 0.7, axis="width", metric="parameters", length=16)


def exact(model_config, shape: Shape, kept, metric: str) -> float:
    abstract = abstract_decoder(shaped(model_config, shape, kept))
    return count_parameters(abstract).total if metric == "parameters" else training_flops(abstract, 32)


TOY = llama(vocab_size=64, d_model=64, n_layers=6, n_heads=8, n_kv_heads=4, d_ff=176, max_length=64)
COUNTED = {
    "llama": TOY,
    "tied": TOY.replace(tied_embedding=True),
    "biases, positions, no gate": TOY.replace(
        pattern=(
            replace(
                TOY.pattern[0],
                attention=replace(TOY.pattern[0].attention, qkv_bias=True, out_bias=True),
                mlp=Dense(d_ff=176, gated=False, bias=True),
            ),
        ),
        learned_positions=True,
        head_bias=True,
    ),
    "sinks": TOY.replace(
        pattern=(replace(TOY.pattern[0], attention=replace(TOY.pattern[0].attention, sinks=True)),),
    ),
    "local and experts": TOY.replace(
        pattern=(replace(LOCAL, mlp=Dense(d_ff=100)), replace(PLAIN, mlp=MoE(n_experts=8, d_expert=24, n_shared=1))),
        n_repeats=3,
    ),
}


@pytest.mark.parametrize("metric", ["parameters", "flops"])
@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_models(name, metric):
    model_config = COUNTED[name]
    count = Count(model_config, metric, 32)
    experts = 0.5 if "experts" in name else 1.0
    for n_layers in (6, 5):
        shape = Shape(d_model=40, ffn=0.55, heads=0.5, experts=experts, n_layers=n_layers)
        n_dropped = 6 - n_layers
        all_kept = [(*range(first), *range(first + n_dropped, 6)) for first in range(1, 6 - n_dropped)]
        assert count.of(shape) == pytest.approx(max(exact(model_config, shape, k, metric) for k in all_kept), rel=1e-12)


@pytest.mark.parametrize("axis", ["width", "depth", "any"])
@pytest.mark.parametrize("metric", ["parameters", "flops"])
@pytest.mark.parametrize("name", ["llama", "local and experts"])
def test_candidates_have_the_share_that_is_asked_for(name, metric, axis):
    model_config = COUNTED[name]
    target = 0.67 * exact(model_config, Shape.of(model_config), range(6), metric)
    shapes = candidates(model_config, 0.67, axis=axis, metric=metric, length=32)
    assert len({(s.n_layers, s.d_model) for s in shapes}) == len(shapes)
    for shape in shapes[:3]:
        kept = (*range(1), *range(7 - shape.n_layers, 6))
        found = exact(model_config, shape, kept, metric)
        assert found <= target
        only_layers = shape == whole(model_config, n_layers=shape.n_layers)
        assert only_layers == (axis == "depth") or axis == "any"
        assert only_layers or Count(model_config, metric, 32).of(shape) >= 0.96 * target
        new = shaped(model_config, shape, kept)
        assert new.d_model % 8 == 0
        assert all(b.mlp.d_ff % 8 == 0 or shape.ffn == 1 for b in new.pattern if isinstance(b.mlp, Dense))
        assert shape.n_layers == 6 or axis != "width"
    if axis == "depth":  # one layer more would be too many
        more = replace(shapes[0], n_layers=shapes[0].n_layers + 1)
        assert Count(model_config, metric, 32).of(more) > target
    if axis == "width":
        assert (shapes[0].ffn < 1 or shapes[0].experts < 1) and shapes[0].heads == 1  # noqa: PT018
    if axis == "any":
        assert {6} < {s.n_layers for s in shapes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"keep": 0.01},
            r"keep is 0\.01, and axis 'width' leaves at least 0\.\d+ of the parameters; keep more \(--ratio",
        ),
        ({"keep": 0.01, "axis": "any"}, r"keep is 0\.01, and axis 'any' leaves at least"),
        ({"keep": 0.2, "axis": "depth"}, r"axis 'depth' leaves at least 0\.\d+"),
        ({"keep": 1.0}, "keep is 1.0; give a share between 0 and 1"),
        ({"axis": "height"}, "axis is 'height'; use one of width, depth, any"),
        ({"metric": "bytes"}, "metric is 'bytes'; use one of parameters, flops"),
        (
            {"config": TOY.replace(n_repeats=2), "axis": "depth"},
            "the model has 2 layers, all of which stay; use 'width'",
        ),
    ],
)
def test_targets_out_of_reach_are_refused(changes, message):
    arguments = {"config": TOY, "keep": 0.7, "axis": "width", "metric": "parameters", "length": 32}
    with pytest.raises(ConfigError, match=message):
        candidates(**arguments | changes)


def test_sizes_of_a_wide_model_are_multiples_of_64():
    wide = llama(vocab_size=32000, d_model=2048, n_layers=32, n_heads=16, n_kv_heads=8, d_ff=8192, max_length=2048)
    shapes = candidates(wide, 0.5, axis="any", metric="parameters", length=2048)
    new = [shaped(wide, s, range(s.n_layers)) for s in shapes]
    assert len(new) > 3
    assert all(c.d_model % 64 == 0 and c.pattern[0].mlp.d_ff % 64 == 0 and len(c.pattern) == 1 for c in new)
    kept = count_parameters(abstract_decoder(new[0])).total / count_parameters(abstract_decoder(wide)).total
    assert 0.48 <= kept <= 0.5
