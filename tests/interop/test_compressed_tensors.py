"""Quantised exports: the package compressed-tensors reads the values of the converted model, and transformers runs it.

The reference is the package itself, which unpacks and dequantises the files.
"""

import itertools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import logits_of, quantized_run, random_model, write_run

import efftrain
from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.errors import ConfigError, RunError
from efftrain.interop.export_gguf import export_gguf
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.interop.plan import ExportPlan, Refusal, classify
from efftrain.models.config import llama
from efftrain.models.moe.layer import MoE
from efftrain.models.norms import LayerNorm
from efftrain.models.quantization import Quantization, QuantizationRule, matrices, read
from efftrain.ops.number_formats import parse_format
from efftrain.train.checkpoints.checkpoints import Checkpoints

DENSE = llama(vocab_size=61, d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=88, max_length=64)
EXPERTS = DENSE.with_blocks(mlp=MoE(n_experts=5, d_expert=40, bias_rate=0.0))
IDS = np.random.default_rng(1).integers(0, 61, (2, 40)).astype(np.int32)


def rule(weights=None, activations=None, layers="blocks/.*") -> QuantizationRule:
    weights, activations = (None if text is None else parse_format(text) for text in (weights, activations))
    return QuantizationRule(layers=layers, weights=weights, activations=activations)


# name -> (model, rules, format of the files)
CASES = {
    "int8": (DENSE, (rule("int8"),), "pack-quantized"),
    "int4 in groups": (DENSE, (rule("int4:g8"),), "pack-quantized"),
    "int4, tied": (DENSE.replace(tied_embedding=True), (rule("int4"),), "pack-quantized"),
    "int4, with the head": (DENSE, (rule("int4", layers="blocks/.*|head"),), "pack-quantized"),
    "fp8": (DENSE, (rule("fp8"),), "float-quantized"),
    "ternary": (DENSE, (rule("ternary:g8"),), "pack-quantized"),
    "int8 inputs": (DENSE, (rule("int8", "int8"),), "int-quantized"),
    "int4 with int8 inputs": (DENSE, (rule("int4:g8", "int8"),), "int-quantized"),
    "fp8 inputs": (DENSE, (rule("fp8", "fp8"),), "float-quantized"),
    "two formats": (DENSE, (rule("int4:g8", layers=".*/mlp/.*"), rule("fp8")), "mixed-precision"),
    "experts": (EXPERTS, (rule("int4:g8"),), "pack-quantized"),
    "experts, fp8": (EXPERTS, (rule("fp8"),), "float-quantized"),
    "experts, two formats": (EXPERTS, (rule("int4:g8", layers=".*/mlp/.*"), rule("int8")), "pack-quantized"),
}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs the extra interop-test")


@pytest.fixture(scope="module")
def transformers(torch):
    pytest.importorskip("compressed_tensors", reason="needs the extra interop-test")
    return pytest.importorskip("transformers", reason="needs the extra interop-test")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns the float run of a configuration, and makes each only once."""
    folder, made = tmp_path_factory.mktemp("float"), {}

    def run_of(config) -> Path:
        if config not in made:
            made[config] = write_run(folder / str(len(made)), random_model(config))
        return made[config]

    return run_of


@pytest.fixture(scope="module", params=list(CASES))
def case(request, runs, tmp_path_factory) -> tuple[str, Path, Path]:
    """A quantised run, and its export."""
    config, rules, _ = CASES[request.param]
    folder = tmp_path_factory.mktemp("quantized")
    run = quantized_run(folder / "run", runs(config), Quantization(rules=rules))
    export_model(run, folder / "export", compressed=True)
    return request.param, run, folder / "export"


def test_the_package_dequantizes_to_the_values_of_the_model(case, transformers, torch, tmp_path):
    from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer
    from safetensors.torch import load_file

    name, run, export = case
    assert json.loads((export / "config.json").read_text())["quantization_config"]["format"] == CASES[name][2]
    stored = load_file(export / "model.safetensors")
    reader = CompressedTensorsDequantizer(export, dtype=torch.float32)
    theirs = reader.process(dict(stored))
    export_model(run, tmp_path / "float")
    ours = load_file(tmp_path / "float" / "model.safetensors")
    assert theirs.keys() == ours.keys()
    for module, tensor in ours.items():
        assert torch.equal(theirs[module], tensor), module
    model = efftrain.load(run)
    query = next(module for name, module, _ in matrices(model) if name == "blocks/0/attention/query")
    wanted = np.asarray(read(query, "kernel", jnp.float32))[1].T
    np.testing.assert_array_equal(theirs["model.layers.1.self_attn.q_proj.weight"].numpy(), wanted)
    assert len(np.unique(wanted)) > 100  # several scales


def test_transformers_computes_the_logits_of_the_model(case, transformers, torch):
    _, run, export = case
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        export, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits = theirs.eval()(torch.from_numpy(IDS).long()).logits.numpy()
    difference = np.abs(np.asarray(logits_of(efftrain.load(run), IDS)) - logits).max() / logits.std()
    assert difference < 1e-4, difference


def test_quantized_matrices_take_the_bits_of_their_format(runs, tmp_path):
    sizes = {}
    for name in ("int8", "int4:g8", "ternary:g8"):
        run = quantized_run(tmp_path / name, runs(DENSE), Quantization(rules=(rule(name),)))
        export_model(run, tmp_path / f"{name}-export", compressed=True)
        sizes[name] = (tmp_path / f"{name}-export" / "model.safetensors").stat().st_size
    numbers = 2 * (48 * 48 * 2 + 2 * 48 * 16 + 3 * 48 * 88)
    scales = 4 * (numbers // 8 - 2 * (2 * 48 + 2 * 16 + 2 * 88 + 48))
    assert sizes["int8"] - sizes["int4:g8"] == pytest.approx(numbers / 2 - scales, rel=0.02)
    assert sizes["int4:g8"] - sizes["ternary:g8"] == pytest.approx(numbers / 4, rel=0.05)


def test_a_quantized_run_has_its_values_in_float_formats_too(case, torch, tmp_path):
    name, run, _ = case
    plan = export_model(run, tmp_path / "float")
    assert any("in float" in note for note in plan.notes)
    assert any("inputs" in note for note in plan.notes) == ("inputs" in name)
    assert "quantization_config" not in plan.settings
    import_model(tmp_path / "float", tmp_path / "again")
    if "inputs" not in name:
        model, again = efftrain.load(run), efftrain.load(tmp_path / "again")
        np.testing.assert_array_equal(logits_of(model, IDS), logits_of(again, IDS))


@pytest.mark.parametrize("compressed", [True, False])
def test_small_blocks_of_a_checkpoint_give_the_same_files(runs, compressed, tmp_path, monkeypatch):
    tied = DENSE.replace(tied_embedding=True)
    layers = "blocks/.*" if compressed else "blocks/.*|embedding"
    run = quantized_run(tmp_path / "run", runs(tied), Quantization(rules=(rule("int4:g8", layers=layers),)))
    export_model(run, tmp_path / "whole", compressed=compressed)
    whole_blocks = Checkpoints.model_blocks

    def small(blocks):
        for index, block in blocks:
            rows = [range(part.start, part.stop) for part in index[:-1]]
            for place in itertools.product(*rows):  # a row, which may be a part of a group
                here = tuple(i - part.start for i, part in zip(place, index[:-1], strict=True))
                one = tuple(slice(i, i + 1) for i in place)
                yield (*one, index[-1]), block[here].reshape((1,) * len(place) + block.shape[-1:])

    def model_blocks(self, abstract):
        return {name: small(blocks) for name, blocks in whole_blocks(self, abstract).items()}

    monkeypatch.setattr(Checkpoints, "model_blocks", model_blocks)
    export_model(run, tmp_path / "small", compressed=compressed)
    whole, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "small"))
    assert whole == again


def test_a_run_trained_for_quantization_is_exported_with_the_values_of_its_products(tmp_path):
    trained = random_model(DENSE.replace(quantization=Quantization(rules=(rule("int4:g8"),))))
    run = write_run(tmp_path / "run", trained)
    export_model(run, tmp_path / "export")
    import_model(tmp_path / "export", tmp_path / "again")
    again = efftrain.load(tmp_path / "again")
    assert not again.config.quantization.rules
    np.testing.assert_allclose(logits_of(trained, IDS), logits_of(again, IDS), atol=1e-5)
    assert np.abs(np.asarray(logits_of(again, IDS)) - np.asarray(logits_of(random_model(DENSE), IDS))).max() > 0.1
    with pytest.raises(ConfigError, match="are float; quantise them with efftrain compress quantize"):
        export_model(run, tmp_path / "quantised", compressed=True)


def test_an_import_refuses_quantized_files_in_one_sentence(runs, tmp_path):
    run = quantized_run(tmp_path / "run", runs(DENSE), Quantization(rules=(rule("int8"),)))
    export_model(run, tmp_path / "export", compressed=True)
    with pytest.raises(RunError, match="is of dtype I32; import the model in bfloat16"):
        import_model(tmp_path / "export", tmp_path / "again")


@pytest.mark.parametrize("config", [DENSE, DENSE.replace(d_model=56)], ids=["llama", "mistral"])
def test_a_quantized_run_is_exported_as_gguf_with_its_values(runs, config, tmp_path):
    config = config.replace(vocab_size=300)
    run = quantized_run(tmp_path / "run", runs(config), Quantization(rules=(rule("int4"),)))
    train_tokenizer(["a few words and a few more words"], 280).save(str(run / "tokenizer.json"))
    export_gguf(run, tmp_path / "model.gguf", "F32")
    import_model(tmp_path / "model.gguf", tmp_path / "again")
    ours, again = (logits_of(efftrain.load(folder), IDS) for folder in (run, tmp_path / "again"))
    np.testing.assert_array_equal(ours, again)
    assert not np.array_equal(ours, logits_of(efftrain.load(runs(config)), IDS))


REFUSALS = {
    "no rules": (DENSE, (), "quantises no weights"),
    "a table": (DENSE, (rule("int8", layers="embedding"),), "has weights for embedding"),
    "only inputs": (DENSE, (rule(activations="int8"),), "activations without weights"),
    "fp8 in groups": (DENSE, (rule("fp8:g8"),), "fp8:g8, and programs read fp8 with one scale"),
    "inputs of another kind": (DENSE, (rule("fp8", "int8"),), "activations int8 with weights fp8"),
    "ternary inputs": (DENSE, (rule("int8", "ternary"),), "activations ternary"),
    "experts of two formats": (
        EXPERTS,
        (rule("int8", layers=".*/mlp/gate"), rule("int4:g8")),
        "gives experts the formats",
    ),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_what_the_format_cannot_express_is_refused_before_training(name):
    config, rules, message = REFUSALS[name]
    config = config.replace(quantization=Quantization(rules=rules))
    refusal = classify(config, compressed=True)
    assert isinstance(refusal, Refusal)
    assert message in refusal.reason
    assert any("--format float32" in text for text in refusal.alternatives)
    assert isinstance(classify(config), ExportPlan)


def test_matrices_that_are_not_of_linear_modules_are_refused():
    from efftrain.models.config import Attention, BlockConfig, Dense
    from efftrain.models.positions import NoPosition

    attention = Attention(n_heads=4, n_kv_heads=4, d_head=8, position=NoPosition(), qkv_bias=True, out_bias=True)
    block = BlockConfig(attention=attention, mlp=Dense(d_ff=64, gated=False, bias=True, activation="gelu_tanh"))
    gpt2 = DENSE.replace(
        d_model=32, pattern=(block,), norm=LayerNorm(), learned_positions=True, tied_embedding=True,
        quantization=Quantization(rules=(rule("int8"),)),
    )  # fmt: skip
    refusal = classify(gpt2, compressed=True)
    assert isinstance(refusal, Refusal)
    assert "GPT2LMHeadModel" in refusal.reason


def test_what_programs_may_not_do_is_noted():
    def notes(config, *rules, **more) -> str:
        plan = classify(config.replace(quantization=Quantization(rules=rules, **more)), compressed=True)
        assert isinstance(plan, ExportPlan)
        return " ".join(plan.notes)

    assert not notes(DENSE, rule("int8"))
    assert "groups of 32, 64 and 128" in notes(DENSE, rule("int4:g8"))
    assert "2 bits" in notes(DENSE, rule("ternary"))
    assert "stay float" in notes(EXPERTS, rule("int8", layers=".*/attention/.*"))
    assert "cache" in notes(DENSE, rule("int8"), cache=parse_format("int8"))
