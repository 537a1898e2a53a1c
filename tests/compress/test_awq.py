"""AWQ: of which output its errors are, what is clipped, and that it beats rounding where inputs have outliers."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import PLAIN, build, config, tokens

from efftrain.compress.layerwise.calibration import CalibrationRows, forward, matrix_errors
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.quantization.awq import part_errors, shared_inputs, tried_factors
from efftrain.compress.quantization.clipping import CLIPS, clipped
from efftrain.compress.quantization.convert import convert
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer
from efftrain.ops.quantize import fake_quantize, quantize

INT4 = Integer(bits=4)
MHA = replace(PLAIN, attention=replace(PLAIN.attention, n_kv_heads=4))


def text(n: int = 24, length: int = 16, seed: int = 3) -> CalibrationRows:
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
    return CalibrationRows(tokens(n, length, seed=seed), np.ones((n, length), np.int32), positions)


def with_outliers(seed: int):
    """A model of one layer, two channels of what each of its norms gives eight times as large."""
    model, rng = build(config(pattern=(MHA,), n_repeats=1), seed=seed), np.random.default_rng(seed)
    for norm in (model.blocks[0].attention_norm, model.blocks[0].mlp_norm):
        scale = np.array(norm.scale[...])
        scale[..., rng.choice(16, 2, replace=False)] *= 8
        norm.scale[...] = jnp.asarray(scale)
    return model


@pytest.mark.parametrize("seed", [1, 3])
def test_outputs_of_a_block_with_outliers_change_less_than_by_rounding(seed):
    """On tokens that AWQ did not see."""
    model, held_out = with_outliers(seed), text(seed=100 + seed)
    layer, x = LayerwiseModel.of(model).layers[0], np.asarray(model.embedding(held_out.tokens))

    def outputs(layer) -> tuple[np.ndarray, np.ndarray]:
        attended = layer.attention(layer.attention_norm(x), held_out.positions, held_out.segments)
        return np.asarray(attended), forward(layer, x, held_out)

    before, errors = outputs(layer), {}
    for method in ("rtn", "awq"):
        quantization = Quantization(rules=(QuantizationRule(weights=INT4),))
        found, _ = convert(LayerwiseModel.of(model), quantization, method=method, calibration=text(seed=seed))
        after = outputs(found.layers()[0])
        errors[method] = [np.square(a - b).mean() for a, b in zip(after, before, strict=True)]
    assert errors["awq"][0] < 0.8 * errors["rtn"][0]
    assert errors["awq"][1] < 0.8 * errors["rtn"][1]


def test_errors_are_those_of_the_attentions_output_on_tokens_that_are_no_padding():
    """With factors 1 those of plain rounding of queries, keys and values together."""
    block, given = LayerwiseModel.of(build(config(pattern=(MHA,), n_repeats=1))).layers[0], text(8)
    segments = np.where(np.arange(16) < 11, given.segments, 0)
    x = np.random.default_rng(0).normal(size=(8, 16, 16)).astype(np.float32)
    x[:, 11:] *= 100
    shared = next(shared for shared in shared_inputs(block) if shared.part == "attention")
    factors = tried_factors(jnp.asarray(np.random.default_rng(1).uniform(0.1, 3, 16), jnp.float32))
    np.testing.assert_allclose(factors[0], 1)
    errors = part_errors(block, shared, (INT4,) * 3, factors, x, replace(given, segments=segments, norm_limit=None))
    read = block.attention_norm(x)[:, :11]
    where = given.positions[:, :11], given.segments[:, :11]
    before = block.attention(read, *where)
    for power in (0, 12):
        rounded = LayerwiseModel.of(build(config(pattern=(MHA,), n_repeats=1))).layers[0].attention
        for product in (rounded.query, rounded.key, rounded.value):
            scaled = product.kernel[...] * factors[power][:, None]
            product.kernel[...] = fake_quantize(scaled, INT4) / factors[power][:, None]
        expected = np.square(rounded(read, *where) - before).sum()
        assert errors[power] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("format", [INT4, Integer(bits=4, group=8)], ids=["channels", "groups"])
def test_clips_are_the_best_of_those_that_are_tried_for_each_group_and_output(format):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(200, 32)), rng.standard_t(3, size=(32, 6))  # large weights are rare
    given = jnp.asarray(w, jnp.float32), jnp.asarray(x.T @ x, jnp.float32), format
    found = np.asarray(clipped(*given).dequantize(), np.float64)
    size = format.group or 32
    for start in range(0, 32, size):
        part = slice(start, start + size)
        for f in range(6):
            largest, errors = np.abs(w[part, f]).max(), []
            for share in CLIPS:
                step = np.float64(jnp.asarray(share * largest / 7.5, jnp.bfloat16))
                value = np.clip(np.round(w[part, f] / step), -8, 7) * step
                errors.append(np.square(x[:, part] @ (value - w[part, f])).sum())
            assert np.square(x[:, part] @ (found[part, f] - w[part, f])).sum() == pytest.approx(min(errors), rel=1e-2)
    errors = [
        matrix_errors(jnp.asarray(a, jnp.float32), *given[:2]).outputs
        for a in (found, quantize(given[0], format).dequantize())
    ]
    assert errors[0] < 0.97 * errors[1]


def test_a_matrix_whose_inputs_cannot_be_scaled_is_clipped_and_the_report_says_so():
    model = build(config(pattern=(PLAIN,), n_repeats=1))  # two heads read one value
    quantization = Quantization(rules=(QuantizationRule(weights=INT4),))
    _, report = convert(LayerwiseModel.of(model), quantization, method="awq", calibration=text())
    rows = {m.name.removeprefix("blocks/0/"): m for m in report.matrices}
    assert rows["attention/out"].method == "awq"
    assert rows["attention/out"].why.startswith("only clipped; its inputs cannot be scaled")
    assert {rows[name].why for name in ("attention/query", "attention/value", "mlp/gate", "mlp/down")} == {""}
