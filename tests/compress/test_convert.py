"""Conversion layer by layer: what it gives, what it reports, what it holds, what it refuses."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import LOCAL, PLAIN, build, config, tokens

from efftrain.compress.layerwise.calibration import CalibrationRows, forward, hessians
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.quantization.awq import scale_inputs
from efftrain.compress.quantization.convert import convert
from efftrain.compress.quantization.mixed_precision import choose_formats
from efftrain.errors import ConfigError
from efftrain.measure.cost.parameters import stored_bytes
from efftrain.measure.measurements import Measurements, write_json
from efftrain.models.config import Dense, LayerDropout
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.models.moe import MoE
from efftrain.models.norms import RMS, LayerNorm
from efftrain.models.quantization import Quantization, QuantizationRule, give_rules, matrices
from efftrain.models.residual import Parallel, PostNorm, Sandwich
from efftrain.ops.number_formats import Float8, Integer
from efftrain.train.checkpoints.flat_state import flatten, unflatten

INT8, INT4 = Integer(bits=8), Integer(bits=4, group=4)
MHA = replace(PLAIN, attention=replace(PLAIN.attention, n_kv_heads=4))


def weights(format, layers: str = "blocks/.*", **changes) -> Quantization:
    return Quantization(rules=(QuantizationRule(layers=layers, weights=format, **changes),))


def logits(model: Decoder, batch: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, batch: nnx.merge(graph, state)(batch))(state, batch))


def calibration(n: int = 24, length: int = 16) -> CalibrationRows:
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
    return CalibrationRows(tokens(n, length, seed=3), np.ones((n, length), np.int32), positions)


def trained_for(model: Decoder, quantization: Quantization) -> Decoder:
    """The same parameters in a model that is trained for quantisation."""
    graph, state = nnx.split(build(model.config.replace(quantization=quantization)))
    return nnx.merge(graph, unflatten(flatten(state) | flatten(nnx.state(model)), state))


MODELS = {
    "two kinds of layers": config(),
    "experts, layers left out": config(
        pattern=(PLAIN, replace(PLAIN, mlp=MoE(n_experts=4, d_expert=8, n_shared=1))),
        layer_dropout=LayerDropout(rate=0.1),
    ),
    "mixture of depths, scan": config(pattern=(PLAIN, replace(PLAIN, depth=MixtureOfDepths(capacity=0.5))), scan=True),
    "recursion": config(pattern=(PLAIN, replace(PLAIN, depth=Recursion(shares=(1.0, 0.5)))), n_repeats=1),
    "bfloat16, tied": config(pattern=(PLAIN,), dtype="bfloat16", tied_embedding=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_pieces_make_the_model_that_they_were(name):
    model = build(MODELS[name])
    for unrolled in (False, True):
        pieces = LayerwiseModel.of(model)
        target = pieces.unrolled() if unrolled else pieces.config
        again = assemble(target, pieces.outer, [nnx.state(layer) for layer in pieces.layers])
        np.testing.assert_array_equal(logits(again, tokens()), logits(model, tokens()))
        if not unrolled:
            jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("unrolled", [False, True], ids=["stacked", "unrolled"])
def test_rounding_gives_what_training_for_it_computes_to_the_bit(name, unrolled):
    model = build(MODELS[name])
    converted, report = convert(LayerwiseModel.of(model), weights(INT4), unrolled=unrolled)
    np.testing.assert_array_equal(logits(converted, tokens()), logits(trained_for(model, weights(INT4)), tokens()))
    assert converted.config.quantization.stored
    assert report.bytes_share == (0.5 + 2 / 4) / 4
    kept = {m.name for m in report.matrices if m.method == "none"}
    assert kept == {"embedding"} | ({"head"} if not model.config.tied_embedding else set())
    assert all(m.why for m in report.matrices if m.method == "none")


@pytest.mark.smoke
def test_learned_steps_become_the_scales():
    model = build(config(quantization=weights(INT4, learned_step=True)))
    converted, _ = convert(LayerwiseModel.of(model), model.config.quantization)
    np.testing.assert_array_equal(logits(converted, tokens()), logits(model, tokens()))
    # With other rules they are not used: as if they had not been learned.
    forgotten, _ = convert(LayerwiseModel.of(model), weights(INT4))
    assert np.abs(logits(forgotten, tokens()) - logits(model, tokens())).max() > 1e-3


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_that_look_at_text_change_outputs_less(method):
    """Output errors of single products on the calibration's text, and of the model on other text."""
    model, text = build(config(pattern=(MHA,), n_repeats=3, max_length=32)), calibration(48)
    errors = {}
    for how in ("rtn", method):
        found, report = convert(LayerwiseModel.of(model), weights(Integer(bits=4)), method=how, calibration=text)
        difference = np.abs(logits(found, tokens(16, 16, seed=9)) - logits(model, tokens(16, 16, seed=9))).mean()
        errors[how] = difference, {m.name: m.output_error for m in report.matrices if m.method == how}
    assert errors[method][0] < errors["rtn"][0]
    assert len(errors[method][1]) == 3 * 7
    assert max(error for name, error in errors[method][1].items()) < 0.3


BIASED = replace(
    MHA,
    attention=replace(MHA.attention, qkv_bias=True, out_bias=True),
    mlp=Dense(d_ff=24, activation="gelu", bias=True),
)
UNGATED = replace(MHA, mlp=Dense(d_ff=24, activation="gelu", gated=False, bias=True))


@pytest.mark.parametrize(
    ("layer", "norm", "n"),
    [
        (MHA, RMS(), 7),
        (BIASED, LayerNorm(), 7),
        (replace(BIASED, residual=Sandwich()), RMS(zero_centered=True), 7),
        (UNGATED, LayerNorm(), 5),  # all but the product after the activation
        (replace(MHA, residual=PostNorm()), RMS(), 2),
        (replace(MHA, residual=Parallel()), RMS(), 2),
        (replace(MHA, residual=Parallel(shared_norm=False)), RMS(), 7),
    ],
)
def test_awq_changes_nothing_before_rounding(layer, norm, n):
    block = LayerwiseModel.of(build(config(pattern=(layer,), n_repeats=1, norm=norm))).layers[0]
    text = calibration()
    x = np.random.default_rng(0).normal(size=(24, 16, 16)).astype(np.float32) * np.linspace(
        0.1, 4, 16, dtype=np.float32
    )
    before, found = forward(block, x, text), hessians(block, x, text)
    give_rules(block, weights(INT4), "blocks/0/")
    factors = scale_inputs(block, x, text, found)
    give_rules(block, Quantization())
    assert len(factors) == n
    assert max(np.abs(f - 1).max() for f in factors.values()) > 0.1
    np.testing.assert_allclose(forward(block, x, text), before, atol=1e-4, rtol=1e-4)


def test_products_of_inputs_are_those_of_the_text():
    block = LayerwiseModel.of(build(config(pattern=(PLAIN,), n_repeats=1))).layers[0]
    text = calibration(12)  # not a whole number of batches
    x = np.random.default_rng(0).normal(size=(12, 16, 16)).astype(np.float32)
    found = hessians(block, x, text)
    seen = np.asarray(block.attention_norm(x)).reshape(-1, 16)
    for name in ("query", "key", "value"):
        np.testing.assert_allclose(found[f"attention/{name}"], seen.T @ seen, rtol=1e-4, atol=1e-3)
    assert found["mlp/down"].shape == (24, 24)


def test_the_report_says_what_a_method_was_not_for():
    model = build(MODELS["experts, layers left out"])
    bias = model.blocks[1].mlp.bias
    bias[...] = jnp.zeros_like(bias[...])  # every expert is reached
    _, report = convert(LayerwiseModel.of(model), weights(INT4, ".*"), method="gptq", calibration=calibration())
    assert report.idle_experts == {}
    rows = {m.name: m for m in report.matrices}
    assert (rows["blocks/0/mlp/up"].method, rows["blocks/0/mlp/up"].why) == ("gptq", "")
    assert (rows["blocks/1/mlp/gate"].method, rows["blocks/1/mlp/gate"].why) == (
        "rtn",
        "gptq applies only to dense products",
    )
    assert rows["blocks/1/mlp/shared/up"].method == "gptq"
    assert rows["head"].why == "gptq applies only to the products of blocks"
    routed = build(MODELS["mixture of depths, scan"])
    _, report = convert(LayerwiseModel.of(routed), weights(INT4), method="awq", calibration=calibration())
    assert {m.why for m in report.matrices if m.name.startswith("blocks/1/")} == {"awq applies only to plain blocks"}


def test_no_more_is_held_than_the_float_model_and_two_layers():
    """By JAX's own account of live arrays, at every layer."""
    model_config = config(pattern=(PLAIN,), n_repeats=12, vocab_size=8, tied_embedding=True)
    state = nnx.state(build(model_config))
    arrays = {name: np.asarray(array) for name, array in flatten(state).items()}
    whole = sum(a.nbytes for a in arrays.values())
    layer = sum(a.nbytes for name, a in arrays.items() if name.startswith("blocks/")) // 12
    del state
    before = sum(a.nbytes for a in jax.live_arrays())
    held = []

    def measure(number: int) -> None:
        held.append(sum(a.nbytes for a in jax.live_arrays()) - before)

    pieces = LayerwiseModel(model_config, ((name, jnp.asarray(array)) for name, array in arrays.items()))
    measure(0)
    converted, _ = convert(pieces, weights(INT8), each_layer=measure)
    assert held[0] <= whole + layer
    assert max(held) <= whole + 2 * layer
    del pieces
    assert stored_bytes(converted) < 0.4 * whole
    assert sum(a.nbytes for a in jax.live_arrays()) - before <= stored_bytes(converted) + layer


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"quantization": replace(weights(INT8), stored=True)}, {}, "is converted already; convert the one"),
        ({}, {"method": "gptq"}, "'gptq' needs calibration text; give a corpus"),
        ({}, {"method": "magic"}, "the method is 'magic'; use one of rtn, gptq, awq"),
        ({}, {"quantization": weights(INT8, "nothing")}, "matches no matrix"),
    ],
)
def test_what_cannot_be_converted_is_refused(changes, arguments, message):
    pieces = LayerwiseModel.of(build(config(**changes)))
    with pytest.raises(ConfigError, match=message):
        convert(pieces, **{"quantization": weights(INT8)} | arguments)


def test_calibration_text_of_no_row_is_refused():
    with pytest.raises(ConfigError, match="shorter than one row"):
        CalibrationRows(np.zeros((0, 16), np.int32), np.zeros((0, 16), np.int32), np.zeros((0, 16), np.int32))


def test_a_budget_is_tried_on_float_matrices(tmp_path):
    """A model that was trained for 4 bits has no second rounding in the trials, and stays as it was."""
    model = build(config(pattern=(PLAIN,), n_repeats=1, quantization=weights(INT4)))
    before = logits(model, tokens())
    seen = []

    def bpb(candidate: Decoder) -> float:
        seen.append(logits(candidate, tokens()))
        return 0.0

    choose_formats(model, (Integer(bits=4, group=8), INT8), 0.2, bpb, Measurements(tmp_path / "choice.json", {}, {}))
    plain = build(config(pattern=(PLAIN,), n_repeats=1))
    np.testing.assert_array_equal(seen[0], logits(trained_for(plain, weights(INT8)), tokens()))
    np.testing.assert_array_equal(logits(model, tokens()), before)
    with pytest.raises(ConfigError, match="int8 and fp8 take the same number of bytes; remove one of them"):
        choose_formats(model, (INT8, Float8()), 0.2, bpb, Measurements(tmp_path / "choice.json", {}, {}))
    n = len(seen)
    choose_formats(
        model, (INT8, INT4), 0.9, bpb, Measurements(tmp_path / "choice.json", {}, {})
    )  # all fit in int8: no trials
    assert len(seen) == n


def test_errors_of_outputs_are_measured_where_inputs_were_scaled():
    """AWQ's report against the outputs themselves, of the first layer's products."""
    model, text = build(config(pattern=(MHA,), n_repeats=1)), calibration()
    x = np.asarray(model.embedding(text.tokens))
    seen = np.asarray(LayerwiseModel.of(model).layers[0].attention_norm(x)).reshape(-1, 16)
    converted, report = convert(LayerwiseModel.of(model), weights(INT4), method="awq", calibration=text)
    new = converted.layers()[0]
    scaled = np.asarray(new.attention_norm(x)).reshape(-1, 16)
    before = seen @ np.asarray(LayerwiseModel.of(model).layers[0].attention.query.kernel[...])
    change = scaled @ np.asarray(new.attention.query.cast_kernel()) - before
    error = next(m.output_error for m in report.matrices if m.name == "blocks/0/attention/query")
    assert error == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before), rel=1e-3)


def test_learned_steps_are_kept_by_every_method():
    model = build(config(pattern=(MHA,), n_repeats=1, quantization=weights(INT4, learned_step=True)))
    for method in ("gptq", "awq"):
        found, report = convert(
            LayerwiseModel.of(model), model.config.quantization, method=method, calibration=calibration()
        )
        np.testing.assert_array_equal(logits(found, tokens()), logits(model, tokens()))
        assert {m.why for m in report.matrices if m.name.startswith("blocks")} == {"its steps were learned"}


def test_a_budget_goes_to_the_layers_that_need_it(tmp_path):
    """Bits per byte of a made-up kind: how far matrices are from what they were, and layer 2's attention ten times."""
    model = build(config(pattern=(PLAIN,), n_repeats=4))
    original = {name: np.asarray(getattr(module, a)[...]) for name, module, a in matrices(model)}
    calls = []

    def bpb(candidate: Decoder) -> float:
        calls.append(1)
        total = 0.0
        for name, module, attribute in matrices(candidate):
            change = np.square(np.asarray(getattr(module, attribute)[...]) - original[name])
            if "attention" in name:
                change[2] *= 10
            total += float(change.sum())
        return total

    formats = (INT8, Integer(bits=4, group=8))
    choice = choose_formats(model, formats, 0.22, bpb, Measurements(tmp_path / "choice.json", {}, {}))
    assert choice.share <= 0.22
    rules = {rule.weights.bits: rule for rule in choice.rules}
    converted, report = convert(LayerwiseModel.of(model), Quantization(rules=choice.rules), unrolled=True)
    by_name = {m.name: m.format for m in report.matrices}
    assert by_name["blocks/2/attention/query"] == "int8"
    assert set(by_name.values()) == {"int8", "int4:g8", "float32"}
    assert report.bytes_share == pytest.approx(choice.share)
    assert set(rules) == {8, 4}
    assert np.isfinite(logits(converted, tokens())).all()
    # What was measured is not measured again.
    n = len(calls)
    assert n == 1 + 4 * 2
    assert choose_formats(model, formats, 0.22, bpb, Measurements(tmp_path / "choice.json", {}, {})) == choice
    assert len(calls) == n
    with pytest.raises(ConfigError, match=r"--budget 0\.1 is below 0\.1875, the share with int4:g8 in all blocks"):
        choose_formats(model, formats, 0.1, bpb, Measurements(tmp_path / "choice.json", {}, {}))
    # A part whose bits per byte are not finite in a format has it last.
    spoiled = iter([1.0, *(1.1,) * 4, math.nan, *(1.1,) * 3])
    choice = choose_formats(
        model, formats, 0.2, lambda _: next(spoiled), Measurements(tmp_path / "spoiled.json", {}, {})
    )
    (in_8_bits,) = (rule.layers for rule in choice.rules if rule.weights.bits == 8)
    assert in_8_bits == "blocks/((2)/attention(/.*)?)"
    write_json(tmp_path / "report.json", choice.as_json())
    assert json.loads((tmp_path / "report.json").read_text())["costs"]["layer 2 attention in int4:g8"] is None
    with pytest.raises(ConfigError, match="no finite bits per byte in int8"):
        choose_formats(model, formats, 0.2, lambda _: math.inf, Measurements(tmp_path / "none.json", {}, {}))


def test_local_layers_are_plain_blocks():
    """Windows and normalised keys are no reason to round."""
    model = build(config(pattern=(LOCAL,), n_repeats=2))
    _, report = convert(LayerwiseModel.of(model), weights(Integer(bits=4)), method="gptq", calibration=calibration())
    assert {m.method for m in report.matrices if m.name.startswith("blocks")} == {"gptq"}
