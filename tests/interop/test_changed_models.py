"""Models that training or compression changed: pruned, of several widths, with early exits; as transformers runs them.

The reference is transformers, which knows nothing of what was changed: it gets a plain model.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from small_runs import logits_of, quantized_run, random_model, write_run

import efftrain
from efftrain.compress.layerwise.calibration import CalibrationRows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import prune
from efftrain.compress.structured.cut import structured_prune
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape
from efftrain.config import to_json
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.interop.plan import Refusal, classify
from efftrain.models.config import Dense, LayerDropout, ModelConfig, llama
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion
from efftrain.models.moe.layer import MoE
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.masks import SemiStructured, Unstructured
from efftrain.ops.number_formats import parse_format
from efftrain.train.objectives.objective import EarlyExitLoss

WHOLE = llama(vocab_size=61, d_model=48, n_layers=4, n_heads=6, n_kv_heads=2, d_ff=88, max_length=64)
IDS = np.random.default_rng(1).integers(0, 61, (2, 40)).astype(np.int32)
BLOCK = WHOLE.pattern[0]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs the extra interop-test")
    return pytest.importorskip("transformers", reason="needs the extra interop-test")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "plain", random_model(WHOLE))


def loaded(transformers, folder: Path):
    """The model as transformers reads it; every parameter must come from the files."""
    import torch

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def their_logits(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def check_equal(transformers, model: Decoder, folder: Path) -> None:
    logits = their_logits(loaded(transformers, folder))
    assert np.abs(np.asarray(logits_of(model, IDS)) - logits).max() < 1e-4 * logits.std()


def blocks(*widths: tuple[int, int, int], **attention) -> ModelConfig:
    """A model with a layer for each (query heads, KV heads, FFN units)."""
    return WHOLE.replace(
        n_repeats=1,
        pattern=tuple(
            replace(
                BLOCK,
                attention=replace(BLOCK.attention, n_heads=n, n_kv_heads=kv, **attention),
                mlp=Dense(d_ff=d_ff),
            )
            for n, kv, d_ff in widths
        ),
    )


EXPERTS = tuple(replace(BLOCK, mlp=MoE(n_experts=4, d_expert=d, bias_rate=0.0)) for d in (24, 40))
SEVERAL_WIDTHS = {
    "units": blocks((6, 2, 88), (6, 2, 40), (6, 2, 64)),
    "heads": blocks((6, 2, 88), (3, 1, 88)),
    "heads, with norms": blocks((6, 2, 88), (3, 1, 40), qk_norm=True),
    "query heads of one KV head, with biases": blocks((2, 1, 88), (6, 1, 40), qkv_bias=True, out_bias=True),
    "experts": WHOLE.replace(pattern=EXPERTS, n_repeats=2),
}


@pytest.mark.parametrize("name", list(SEVERAL_WIDTHS))
def test_layers_of_several_widths_are_filled_up_exactly(transformers, name, tmp_path):
    model = random_model(SEVERAL_WIDTHS[name])
    plan = export_model(write_run(tmp_path / "run", model), tmp_path / "export")
    assert any("filled up with zeros" in note for note in plan.notes)
    check_equal(transformers, model, tmp_path / "export")


def test_the_note_says_how_much_is_filled_up(tmp_path):
    config = SEVERAL_WIDTHS["units"]
    model = random_model(config)
    plan = export_model(write_run(tmp_path / "run", model), tmp_path / "export")
    files = load_file(tmp_path / "export" / "model.safetensors")
    zeros, size = sum(int((a == 0).sum()) for a in files.values()), sum(a.size for a in files.values())
    assert zeros == 3 * 48 * (3 * 88 - (88 + 40 + 64))
    assert f"{zeros / size:.0%} of the exported numbers" in plan.notes[0]
    assert not classify(WHOLE).notes


def test_a_quantized_model_of_several_widths_is_filled_up_exactly(transformers, tmp_path):
    pytest.importorskip("compressed_tensors", reason="needs the extra interop-test")
    write_run(tmp_path / "float", random_model(SEVERAL_WIDTHS["units"]))
    rules = (QuantizationRule(weights=parse_format("int4:g8")),)
    run = quantized_run(tmp_path / "run", tmp_path / "float", Quantization(rules=rules))
    export_model(run, tmp_path / "export", compressed=True)
    check_equal(transformers, efftrain.load(run), tmp_path / "export")


def test_widths_for_which_zeros_are_not_exact_are_refused():
    for config, message in (
        (blocks((6, 2, 88), (4, 2, 88)), "the same number of query heads per KV head"),
        (blocks((6, 2, 88), (3, 1, 88), qk_norm="full"), "would change what it divides by"),
    ):
        refusal = classify(config)
        assert isinstance(refusal, Refusal)
        assert message in refusal.reason


CUTS = {
    "layers": (WHOLE, {"n_layers": 2}),
    "channels, heads and units": (WHOLE, {"d_model": 32, "heads": 0.5, "ffn": 0.5}),
    "experts": (WHOLE.with_blocks(mlp=MoE(n_experts=5, d_expert=40, bias_rate=0.0)), {"experts": 0.6, "n_layers": 3}),
}


@pytest.mark.parametrize("name", list(CUTS))
def test_a_structurally_pruned_model_is_a_smaller_plain_one(transformers, name, tmp_path):
    config, shape = CUTS[name]
    pieces = LayerwiseModel.of(random_model(config))
    rows = np.ones_like(IDS)
    text = CalibrationRows(IDS, rows, np.broadcast_to(np.arange(rows.shape[1], dtype=np.int32), rows.shape))
    model, report = structured_prune(pieces, replace(Shape.of(config), **shape), importance(pieces, text))
    plan = export_model(write_run(tmp_path / "run", model), tmp_path / "export")
    assert not plan.notes
    check_equal(transformers, model, tmp_path / "export")
    settings = json.loads((tmp_path / "export" / "config.json").read_text())
    # Of 32 channels and 3 heads, transformers takes no Llama, but a Mistral without a window.
    assert settings["model_type"] == {"layers": "llama", "experts": "mixtral"}.get(name, "mistral")
    if settings["model_type"] == "mistral":
        assert settings["sliding_window"] is None  # a missing field would be a window of 4,096
    assert settings["num_hidden_layers"] == len(report.layers)
    assert settings["hidden_size"] == len(report.hidden)


@pytest.mark.parametrize("structure", [Unstructured(sparsity=0.4), SemiStructured(n=2, m=4)])
def test_pruned_weights_are_zeros_and_a_note_says_that_they_save_nothing(transformers, plain, structure, tmp_path):
    model, _ = prune(LayerwiseModel.read(plain), structure, method="magnitude")
    plan = export_model(write_run(tmp_path / "run", model), tmp_path / "export")
    share = "40%" if isinstance(structure, Unstructured) else "50%"
    assert [note for note in plan.notes if note.startswith(share) and "zeros, no speed" in note]
    check_equal(transformers, model, tmp_path / "export")
    assert not export_model(plain, tmp_path / "plain").notes


def test_a_few_zeros_are_no_pruning(tmp_path):
    model = random_model(WHOLE)
    kernel = model.blocks[0].mlp.up.kernel
    kernel[...] = kernel[...].at[0, 0, 0].set(0)
    assert not export_model(write_run(tmp_path / "run", model), tmp_path / "export").notes


def with_exits(folder: Path, **more) -> tuple[Path, Decoder]:
    """A run that was trained in the way of LayerSkip."""
    model = random_model(WHOLE.replace(layer_dropout=LayerDropout(rate=0.1)))
    run = write_run(folder / "run", model, exits=to_json(EarlyExitLoss(scale=0.3, weighting="equal")))
    for name, values in more.items():
        (run / f"{name}.json").write_text(json.dumps(values))
    return run, model


def test_early_exits_are_those_of_the_first_layers_of_the_exported_model(transformers, tmp_path):
    import torch

    run, model = with_exits(tmp_path)
    plan = export_model(run, tmp_path / "export")
    exits = json.loads((tmp_path / "export" / "config.json").read_text())["efftrain"]["early_exit"]
    assert exits == {"layers": [1, 2, 3]}
    assert any("early exits after layers 1 to 3" in note for note in plan.notes)
    check_equal(transformers, model, tmp_path / "export")
    _, exit_ebtd, _ = model.states(jnp.asarray(IDS), exits_e=jnp.asarray([layer - 1 for layer in exits["layers"]]))
    for layer, x_btd in zip(exits["layers"], exit_ebtd, strict=True):
        first = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "export", num_hidden_layers=layer, dtype=torch.float32, attn_implementation="eager"
        )
        logits = their_logits(first.eval())
        ours = np.asarray(model.logits(model.normalised(x_btd)))
        assert np.abs(ours - logits).max() < 1e-4 * logits.std()
    whole = loaded(transformers, tmp_path / "export")
    prompt = {"input_ids": torch.from_numpy(IDS[:1, :8]).long(), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(whole.generate(**prompt), whole.generate(**prompt, assistant_early_exit=2))


def test_an_export_with_early_exits_is_imported_again(tmp_path):
    run, model = with_exits(tmp_path)
    export_model(run, tmp_path / "export")
    assert import_model(tmp_path / "export", tmp_path / "again") == WHOLE
    np.testing.assert_array_equal(logits_of(model, IDS), logits_of(efftrain.load(tmp_path / "again"), IDS))


def test_a_width_that_transformers_refuses_is_refused_here():
    attention = replace(BLOCK.attention, n_heads=3, n_kv_heads=1, qkv_bias=True, out_bias=True)
    refusal = classify(WHOLE.replace(d_model=32).with_blocks(attention=attention))
    assert isinstance(refusal, Refusal)
    assert "LlamaForCausalLM needs a d_model that is a multiple of 3 heads" in refusal.reason


def test_the_draft_that_was_measured_to_be_faster_is_named(tmp_path):
    draft = {"exit_layer": 2, "n_draft": 4}
    run, _ = with_exits(tmp_path, depth={"self_speculation": draft | {"speed": 1.2}})
    plan = export_model(run, tmp_path / "export")
    assert plan.settings["efftrain"]["early_exit"]["draft"] == draft
    assert any("assistant_early_exit=2" in note for note in plan.notes)


@pytest.mark.parametrize("depth", [MixtureOfDepths(capacity=0.5), Recursion(n_layers=1, shares=(1.0, 0.5))])
def test_tokens_that_skip_layers_are_refused_with_the_field(depth):
    refusal = classify(WHOLE.replace(pattern=(BLOCK, replace(BLOCK, depth=depth)), n_repeats=2))
    assert isinstance(refusal, Refusal)
    assert f"layer 1 has depth {type(depth).__name__}" in refusal.reason
    assert "early exits" in refusal.alternatives[0]
