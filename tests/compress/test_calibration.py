"""Statistics of calibration text: from valid tokens alone, and reports that say from how many."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import PLAIN, build, config, tokens
from tiny_runs import LENGTH as ROW
from tiny_runs import write_corpus

from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.layerwise.calibration import (
    CalibrationRows,
    CalibrationSize,
    hessians,
    limiting_factor,
    magnitudes,
    matrix_errors,
)
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.quantization.convert import convert
from efftrain.compress.structured.cut import structured_prune
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape
from efftrain.models.moe import MoE
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.masks import Unstructured
from efftrain.ops.number_formats import Integer
from efftrain.ops.routing import route

INT4 = Quantization(rules=(QuantizationRule(weights=Integer(bits=4)),))
N, LENGTH = 8, 16


def padded(n: int = N, fillers: int = 8) -> CalibrationRows:
    """Two documents a row and padding after the second one, then rows of padding; tokens of padding are like others."""
    place = np.arange(LENGTH)[None]
    end, cut = 9 + np.arange(n)[:, None] % 8, 3 + np.arange(n)[:, None] % 4
    segments = np.where(place >= end, 0, 1 + (place >= cut))
    positions = np.where(place >= cut, place - cut, place)
    filling = np.zeros((fillers, LENGTH), np.int32)
    both = (np.concatenate([a, filling]).astype(np.int32) for a in (segments, positions))
    return CalibrationRows(tokens(n + fillers, LENGTH, seed=3), *both, rows_asked=n + fillers)


def test_sums_over_inputs_are_those_of_the_valid_tokens():
    """Of every product of a block, where padding is a thousand times as large as text."""
    block, text = LayerwiseModel.of(build(config(pattern=(PLAIN,), n_repeats=1))).layers[0], padded()
    text = replace(text, norm_limit=None)
    valid = text.segments > 0
    x = np.random.default_rng(0).normal(size=(*valid.shape, 16)).astype(np.float32)
    x[~valid] *= 1000
    found = hessians(block, x, text), magnitudes(block, x, text)
    read = block.attention_norm(x)
    attended = block.attention(read, text.positions, text.segments)
    inside = block.mlp_norm(x + attended)
    out = block.attention.out.kernel[...]
    block.attention.out.kernel[...] = jnp.eye(16)  # attention gives what its last product reads
    heads = block.attention(read, text.positions, text.segments)
    block.attention.out.kernel[...] = out
    seen = {"mlp/down": jax.nn.silu(block.mlp.gate(inside)) * block.mlp.up(inside), "attention/out": heads}
    seen |= {f"attention/{name}": read for name in ("query", "key", "value")}
    seen |= {f"mlp/{name}": inside for name in ("gate", "up")}
    assert found[0].keys() == found[1].keys() == seen.keys()
    for name, inputs in seen.items():
        of_text = np.asarray(inputs, np.float64)[valid]
        expected = of_text.T @ of_text
        np.testing.assert_allclose(found[0][name], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(found[1][name], np.abs(of_text).sum(0), rtol=1e-3)


def test_a_token_of_massive_activations_does_not_decide_a_sum():
    """The norm of one token in a hundred is a thousand times that of the others; limited, it counts as nine of them."""
    x = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[7] *= 1000
    x[50:] = 0  # padding
    factor = np.asarray(limiting_factor(jnp.asarray(x), 3.0))
    expected = np.ones((100, 1))
    expected[7] = 3 / 1000
    np.testing.assert_allclose(factor, expected, rtol=1e-5)
    limited = x * factor
    np.testing.assert_allclose(np.trace(limited.T @ limited), 49 + 9, rtol=1e-5)
    assert np.all(np.asarray(limiting_factor(jnp.asarray(x), None)) == 1)


def test_the_limit_holds_for_what_each_product_reads():
    block, text = LayerwiseModel.of(build(config(pattern=(PLAIN,), n_repeats=1))).layers[0], padded(n=4, fillers=0)
    x = np.random.default_rng(0).normal(size=(*text.tokens.shape, 16)).astype(np.float32)
    inner = np.asarray(block.mlp_norm(x + block.attention(block.attention_norm(x), text.positions, text.segments)))
    read = np.asarray(jax.nn.silu(block.mlp.gate(inner)) * block.mlp.up(inner), np.float64)[text.segments > 0]
    norms = np.linalg.norm(read, axis=1)
    most = 0.5 * np.median(norms)
    read *= np.minimum(1, most / norms)[:, None]
    found = hessians(block, x, replace(text, norm_limit=0.5))["mlp/down"]
    np.testing.assert_allclose(found, read.T @ read, rtol=1e-3, atol=1e-4 * np.abs(found).max())


def test_errors_by_token_count_every_token_alike():
    """One token's inputs are a thousand times larger, and only its direction is changed."""
    sample = np.eye(16, dtype=np.float32)[:4]
    sample[0] *= 1000
    before = np.eye(16, dtype=np.float32)
    after = before.copy()
    after[0, 0] = 0.5
    found = matrix_errors(jnp.asarray(after), jnp.asarray(before), jnp.asarray(sample.T @ sample), jnp.asarray(sample))
    assert found.outputs == pytest.approx(0.5, rel=1e-4)
    assert found.tokens == pytest.approx(0.25)
    assert found.weights == pytest.approx(0.125)


METHODS = {
    "gptq": lambda model, text: convert(LayerwiseModel.of(model), INT4, method="gptq", calibration=text),
    "awq": lambda model, text: convert(LayerwiseModel.of(model), INT4, method="awq", calibration=text),
    "wanda": lambda model, text: prune(LayerwiseModel.of(model), Unstructured(), method="wanda", calibration=text),
    "sparsegpt": lambda model, text: prune(
        LayerwiseModel.of(model), Unstructured(), method="sparsegpt", calibration=text
    ),
    "structured": lambda model, text: structured_prune(
        LayerwiseModel.of(model), replace(Shape.of(model.config), ffn=0.5), importance(LayerwiseModel.of(model), text)
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_padding_change_nothing_and_the_report_says_how_much_text_there_was(method):
    model, text = build(config(pattern=(PLAIN,), n_repeats=1)), padded()
    plain = CalibrationRows(*(a[:N] for a in (text.tokens, text.segments, text.positions)))
    (with_fillers, report), (without, other) = (METHODS[method](model, calibration) for calibration in (text, plain))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(with_fillers), nnx.state(without))
    n_tokens = int((plain.segments > 0).sum())
    assert report.calibration == CalibrationSize(rows=N, rows_asked=2 * N, tokens=n_tokens)
    assert other.calibration == CalibrationSize(rows=N, rows_asked=None, tokens=n_tokens)
    assert report.as_json()["calibration"] == {"rows": N, "rows_asked": 2 * N, "tokens": n_tokens}


def test_experts_that_no_token_of_the_text_reached_are_named():
    """By a router of 12 experts on the tokens of one row; padding would reach others."""
    block = replace(PLAIN, mlp=MoE(n_experts=12, top_k=1, d_expert=8))
    model, text = build(config(pattern=(block,), n_repeats=1)), padded(1, 7)
    model.blocks[0].mlp.bias[...] = jnp.zeros((1, 12))
    layer = LayerwiseModel.of(model).layers[0]
    x = model.embedding(text.tokens)
    read = layer.mlp_norm(x + layer.attention(layer.attention_norm(x), text.positions, text.segments))
    logits = np.asarray(read) @ np.asarray(layer.mlp.router[...])
    settings = {"top_k": 1, "scores": "softmax", "renormalize": False}
    chosen = np.asarray(route(jnp.asarray(logits.reshape(-1, 12)), layer.mlp.bias[...], **settings).experts_nk)[:, 0]
    valid = text.segments.reshape(-1) > 0
    idle = tuple(sorted(set(range(12)) - set(chosen[valid].tolist())))
    assert 0 < len(idle) < 12
    assert not set(idle) <= set(range(12)) - set(chosen.tolist())  # padding is routed to some of them
    _, converted = METHODS["gptq"](model, text)
    _, pruned = METHODS["wanda"](model, text)
    for report, how, method in ((converted, "rtn", "gptq"), (pruned, "magnitude", "wanda")):
        assert report.idle_experts == {"blocks/0/mlp": idle}
        row = next(m for m in report.matrices if m.name == "blocks/0/mlp/gate")
        assert row.method == how
        names = ", ".join(map(str, idle))
        assert row.why.startswith(f"{method} applies only to dense products")
        assert row.why.endswith(f"; no token of the calibration reached the experts {names}")
        assert "reached" not in next(m for m in report.matrices if m.name == "blocks/0/attention/out").why
    pieces = LayerwiseModel.of(model)
    _, cut = structured_prune(pieces, Shape.of(model.config), importance(pieces, text))
    assert cut.layers[0].idle_experts == idle


def test_fewer_rows_than_asked_for_are_said_and_are_not_filled_up(tmp_path, capsys):
    corpus = write_corpus(tmp_path)
    capsys.readouterr()
    found = CorpusRows(corpus.path, ROW).calibration(500)
    n_tokens = corpus.n_tokens("train")
    rows = -(-(n_tokens - 1) // ROW)
    assert rows % 8
    assert len(found.tokens) == rows
    assert found.size.rows == rows
    assert n_tokens - 1 <= found.size.tokens <= n_tokens
    said = " ".join(capsys.readouterr().err.split())
    assert f"the training split has {rows} rows of {ROW} tokens and 500 were asked for" in said
    assert CorpusRows(corpus.path, ROW).calibration(8).size == CalibrationSize(rows=8, rows_asked=8, tokens=8 * ROW)
    assert "asked for" not in capsys.readouterr().err
