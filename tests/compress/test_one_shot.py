"""Pruning at once: which weights go, by whose inputs, and what is reported."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import PLAIN, build, config, tokens

from efftrain.compress.layerwise.calibration import CalibrationRows, forward, hessians, inputs_of
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import mask_by_inputs, mask_by_magnitude, prune
from efftrain.compress.quantization.convert import convert
from efftrain.errors import ConfigError
from efftrain.models.moe import MoE
from efftrain.models.quantization import Quantization, QuantizationRule, matrices
from efftrain.ops.masks import Blocks, SemiStructured, Unstructured
from efftrain.ops.number_formats import Integer
from efftrain.train.checkpoints.flat_state import flatten

HALF = Unstructured(sparsity=0.5)


def calibration(n: int = 24, length: int = 16) -> CalibrationRows:
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (n, length))
    return CalibrationRows(tokens(n, length, seed=3), np.ones((n, length), np.int32), positions)


def stacked(model: nnx.Module) -> dict[str, np.ndarray]:
    return {name: np.asarray(getattr(m, a)[...]) for name, m, a in matrices(model) if name.startswith("blocks/")}


@pytest.mark.smoke
def test_wanda_ranks_each_output_by_size_times_norm_of_the_input():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 12)) * rng.uniform(0.1, 3, 12), rng.normal(size=(12, 7))
    mask = np.asarray(mask_by_inputs(jnp.asarray(w), jnp.asarray(x.T @ x), Unstructured(sparsity=0.25)))
    score = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    for column, kept in zip(score.T, mask.T, strict=True):
        assert set(np.flatnonzero(~kept)) == set(np.argsort(column)[:3])
    pairs = np.asarray(mask_by_inputs(jnp.asarray(w), jnp.asarray(x.T @ x), SemiStructured(n=1, m=2)))
    want = score.reshape(6, 2, 7).argmax(1)
    np.testing.assert_array_equal(pairs.reshape(6, 2, 7).argmax(1), want)
    assert (pairs.reshape(6, 2, 7).sum(1) == 1).all()


@pytest.mark.parametrize(
    "structure", [HALF, SemiStructured(n=2, m=4), Blocks(rows=4, columns=2)], ids=["half", "2of4", "blocks"]
)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_every_matrix_of_blocks_has_its_zeros(method, structure):
    if method == "sparsegpt" and isinstance(structure, Blocks):
        with pytest.raises(ConfigError, match="does not prune blocks"):
            prune(LayerwiseModel.of(build(config())), structure, method=method, calibration=calibration())
        return
    model = build(config())
    before = jax.tree.map(np.array, nnx.state(model))
    pruned, report = prune(LayerwiseModel.of(model), structure, method=method, calibration=calibration())
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)  # the caller's is as it was
    for name, layers in stacked(pruned).items():
        for layer in layers:
            assert np.count_nonzero(layer) == layer.size // 2, name
    for name, array in flatten(nnx.state(pruned)).items():
        if not name.startswith("blocks/") or "norm" in name:
            np.testing.assert_array_equal(array, flatten(before)[name])
    assert len(report.matrices) == 4 * 7
    assert {(m.method, m.sparsity, m.why) for m in report.matrices} == {(method, 0.5, "")}


def test_methods_that_look_at_text_change_outputs_less():
    found = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        _, report = prune(LayerwiseModel.of(build(config())), HALF, method=method, calibration=calibration())
        errors = [m.output_error for m in report.matrices if m.name.startswith("blocks/0/")]
        found[method] = None if None in errors else np.mean(errors)
    assert found["magnitude"] is None  # it was not asked what its inputs are
    assert found["sparsegpt"] < found["wanda"]
    pieces = LayerwiseModel.of(build(config()))
    first = hessians(pieces.layers[0], inputs_of(pieces.outer, calibration()), calibration())
    errors = []
    for name, module, attribute in matrices(pieces.layers[0]):
        w = getattr(module, attribute)[...]
        change = jnp.where(mask_by_magnitude(w, HALF), 0, w)
        errors.append(float(jnp.sqrt((change * (first[name] @ change)).sum() / (w * (first[name] @ w)).sum())))
    assert found["wanda"] < np.mean(errors)


def test_a_layer_is_pruned_by_what_pruned_layers_before_it_say():
    pruned, _ = prune(LayerwiseModel.of(build(config())), HALF, method="wanda", calibration=calibration())
    dense, halves = LayerwiseModel.of(build(config())), LayerwiseModel.of(pruned)
    x = {}
    for name, pieces in (("dense", dense), ("pruned", halves)):
        x[name] = inputs_of(pieces.outer, calibration())
        for layer in pieces.layers[:3]:
            x[name] = forward(layer, x[name], calibration())
    masks = {}
    for name in x:
        hessian = hessians(dense.layers[3], x[name], calibration())["attention/query"]
        masks[name] = np.asarray(mask_by_inputs(dense.layers[3].attention.query.kernel[...], hessian, HALF))
    found = np.asarray(halves.layers[3].attention.query.kernel[...]) != 0
    np.testing.assert_array_equal(found, masks["pruned"])
    assert (found != masks["dense"]).any()


def test_experts_are_pruned_by_magnitude_and_the_report_says_so():
    model = build(config(pattern=(replace(PLAIN, mlp=MoE(n_experts=4, d_expert=8, n_shared=1)),)))
    bias = model.blocks[0].mlp.bias
    bias[...] = jnp.zeros_like(bias[...])  # every expert is reached
    pruned, report = prune(
        LayerwiseModel.of(model), HALF, method="wanda", calibration=calibration(), layers="blocks/0/mlp/.*"
    )
    assert report.idle_experts == {}
    by_name = {m.name.removeprefix("blocks/1/"): m for m in report.matrices if m.name.startswith("blocks/1/")}
    assert by_name["mlp/gate"].why == "wanda applies only to dense products of plain blocks"
    assert by_name["mlp/shared/up"].method == "wanda"
    assert by_name["attention/query"].sparsity == 0
    experts = stacked(pruned)["blocks/0/mlp/down"]
    assert (np.count_nonzero(experts, axis=(2, 3)) == experts[0, 0].size // 2).all()
    assert np.isfinite(pruned(tokens())).all()


def test_a_report_counts_the_zeros_that_are_stored():
    """Of a 2:4 model that is quantised afterwards: half by pruning, and what rounding adds."""
    sparse, _ = prune(LayerwiseModel.of(build(config())), SemiStructured(n=2, m=4), method="magnitude")
    rules = QuantizationRule(layers="blocks/.*/mlp/.*", weights=Integer(bits=4, group=4))
    stored, report = convert(LayerwiseModel.of(sparse), Quantization(rules=(rules,)))
    rows = {m.name: m for m in report.matrices}
    assert rows["blocks/3/attention/query"].sparsity == 0.5  # float
    assert rows["head"].sparsity == 0
    for name in ("gate", "up", "down"):
        kernel = getattr(stored.blocks[1].mlp, name).kernel
        packed = np.asarray(kernel[...])[1].view(np.uint8)  # layer 3: two levels a byte
        zeros = ((packed & 15) == 0).sum() + ((packed >> 4) == 0).sum()
        assert rows[f"blocks/3/mlp/{name}"].sparsity == zeros / (2 * packed.size) >= 0.5


def test_pruned_and_quantised_in_one_pass_is_stored_so():
    quantization = Quantization(rules=(QuantizationRule(weights=Integer(bits=4, group=4)),))
    pruned, report = prune(
        LayerwiseModel.of(build(config())),
        HALF,
        method="sparsegpt",
        calibration=calibration(),
        quantization=quantization,
    )
    assert pruned.config.quantization.stored
    assert {m.format for m in report.matrices} == {"int4:g4"}
    # Half a byte of levels and a quarter of a bfloat16 scale, for four bytes.
    assert all(m.sparsity >= 0.5 and m.bytes_after == m.bytes_before / 4 for m in report.matrices)
    for _, module, attribute in matrices(pruned.blocks[0]):
        packed = np.asarray(getattr(module, attribute)[...]).view(np.uint8)
        zeros = ((packed & 15) == 0).sum() + ((packed >> 4) == 0).sum()
        assert zeros >= packed.size  # half of twice as many
    assert np.isfinite(pruned(tokens())).all()


def test_a_model_that_is_trained_for_a_quantisation_stays_one():
    rules = (QuantizationRule(weights=Integer(bits=4, group=4)),)
    model = build(config(quantization=Quantization(rules=rules)))
    pruned, report = prune(LayerwiseModel.of(model), HALF, method="magnitude")
    assert pruned.config == model.config
    assert {m.format for m in report.matrices} == {"float32"}
    for name, layers in stacked(pruned).items():
        want = stacked(model)[name]
        np.testing.assert_array_equal(layers[layers != 0], want[layers != 0])
        assert np.count_nonzero(layers) == layers.size // 2
    learned = Quantization(rules=(replace(rules[0], learned_step=True),))
    with pytest.raises(ConfigError, match="step sizes of the run were learned"):
        prune(LayerwiseModel.of(model), HALF, calibration=calibration(), quantization=learned)


def test_only_what_is_chosen_has_to_fit():
    pruned, _ = prune(
        LayerwiseModel.of(build(config())), SemiStructured(n=1, m=3), method="magnitude", layers=".*/mlp/down"
    )
    down = stacked(pruned)["blocks/1/mlp/down"]  # 12 inputs; attention has 16
    assert (np.count_nonzero(down.reshape(2, 4, 3, -1), axis=2) == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wonder"}, "use one of magnitude, wanda, sparsegpt"),
        ({"method": "wanda"}, "needs calibration text"),
        ({"method": "magnitude", "structure": SemiStructured(n=2, m=5)}, "groups of 5 do not divide its 16 inputs"),
        ({"method": "magnitude", "layers": "blocks/7/.*"}, "matches no matrix; they are blocks/0/attention/key"),
        ({"method": "magnitude", "quantization": Quantization()}, "only sparsegpt prunes and quantises"),
    ],
)
def test_what_cannot_be_pruned_is_refused(arguments, message):
    arguments = {"structure": HALF} | arguments
    with pytest.raises(ConfigError) as error:
        prune(LayerwiseModel.of(build(config())), **arguments)
    assert message in str(error.value)
