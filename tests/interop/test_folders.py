"""Folders with models: written and read again bit by bit, and refused in one sentence where something is wrong."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import efftrain
from efftrain.config import to_json
from efftrain.errors import ConfigError, EfftrainError, RunError
from efftrain.interop.export_gguf import export_gguf
from efftrain.interop.export_model import export_model
from efftrain.interop.import_model import import_model
from efftrain.interop.plan import ExportPlan, Refusal, classify
from efftrain.interop.safetensors_writer import SafetensorsWriter
from efftrain.models.config import LayerDropout, llama
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.models.moe.layer import MoE
from efftrain.models.positions import Rotary
from efftrain.models.rope_scaling import LinearScaling
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.run.directory import read_json, row_length
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

CONFIG = llama(vocab_size=61, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, max_length=32)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    _, params, rest = split_model(Decoder(CONFIG, rngs=nnx.Rngs(0)))
    state = {"params": params, "model_state": rest}
    write_model_run(out, state, step=7, made_from=("made.json", {}), config={"model": to_json(CONFIG)})
    return out


@pytest.fixture(scope="module")
def exported(run) -> Path:
    export_model(run, run.with_name("exported"))
    return run.with_name("exported")


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "folder"))


def arrays(run: Path) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in flatten(nnx.state(efftrain.load(run))).items()}


def test_what_is_exported_and_imported_is_the_same_model(run, folder, tmp_path):
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert import_model(folder, tmp_path / "again") == CONFIG
    again = arrays(tmp_path / "again")
    for name, array in arrays(run).items():
        np.testing.assert_array_equal(array, again[name])


def test_half_of_the_bytes_are_the_nearest_numbers(run, tmp_path):
    export_model(run, tmp_path / "half", dtype="bfloat16")
    import_model(tmp_path / "half", tmp_path / "again")
    wanted = arrays(run)["embedding/table"]
    found = arrays(tmp_path / "again")["embedding/table"]
    np.testing.assert_allclose(found, wanted, rtol=2**-8)
    assert not np.array_equal(found, wanted)


def test_shards_have_an_index_that_the_import_follows(folder, tmp_path):
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    writer = SafetensorsWriter(
        folder, {name: ("F32", a.dtype, a.shape) for name, a in whole.items()}, shard_bytes=5_000
    )
    for name in reversed(whole):
        writer.write(name, whole[name])
    writer.close()
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                np.testing.assert_array_equal(tensors.get_tensor(name), whole[name])
    import_model(folder, tmp_path / "again")
    shards[1].unlink()
    with pytest.raises(RunError, match=f"{shards[1].name} does not exist"):
        import_model(folder, tmp_path / "again2")


def test_a_tensor_that_is_not_written_is_noticed(tmp_path):
    writer = SafetensorsWriter(tmp_path, {"a": ("F32", np.dtype(np.float32), (2,))})
    with pytest.raises(ValueError, match="not written"):
        writer.close()
    with pytest.raises(ValueError, match="announced"):
        writer.write("a", np.zeros(3, np.float32))


def change_weights(**changes):
    """Replaces tensors, or removes those that are None."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        for name, array in changes.items():
            name = name.replace("__", ".")
            tensors.pop(name, None)
            if array is not None:
                tensors[name] = array
        save_file(tensors, folder / WEIGHTS)

    return change


def change_settings(**fields):
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps(values))

    return change


def cut(n_bytes: int):
    def change(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[:n_bytes])

    return change


def only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch hacked'\ntR.")


def index_outside(folder: Path) -> None:
    shutil.move(folder / WEIGHTS, folder.parent / "outside.safetensors")
    index = {"weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model__norm__weight"
MISTAKES = {
    "cut in the header": (cut(20), "is damaged"),
    "cut in the numbers": (cut(-3), "is damaged"),
    "empty": (cut(0), "is damaged"),
    "a missing tensor": (change_weights(**{NORM: None}), "has no tensor model.norm.weight"),
    "one too many": (change_weights(more__weight=np.ones(3, np.float32)), "holds more.weight, which its configuration"),
    "another shape": (change_weights(**{NORM: np.ones(25, np.float32)}), r"has the shape \(25,\)"),
    "integers": (change_weights(**{NORM: np.ones(24, np.int8)}), "model.norm.weight is of dtype I8"),
    "not finite": (change_weights(**{NORM: np.full(24, np.nan, np.float32)}), "not finite|NaN"),
    "pickled": (only_pickled, "is pickled"),
    "a path out of the folder": (index_outside, "no safetensors file of this folder"),
    "an unknown field": (change_settings(logit_scale=0.3), "logit_scale is 0.3; this field is unknown"),
    "an unknown architecture": (change_settings(model_type="mamba"), "model_type is 'mamba'; efftrain imports"),
    "heads that do not divide": (change_settings(num_key_value_heads=3), "n_kv_heads 3 does not divide"),
    "an activation": (change_settings(hidden_act="xielu"), "hidden_act is 'xielu'; only"),
    "a wrong type": (change_settings(hidden_size="wide"), "hidden_size is 'wide'; it must be a number"),
    "a negative count": (change_settings(num_hidden_layers=-2), "num_hidden_layers is -2"),
    "several kinds of input": (change_settings(text_config={}), "text_config makes this a model of several"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not valid JSON"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds no JSON object"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_a_mistake_is_one_sentence_and_leaves_nothing(folder, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change, message = MISTAKES[mistake]
    change(folder)
    with pytest.raises(EfftrainError, match=message):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "hacked").exists()


def test_what_an_import_does_not_know_is_asked_for(folder, tmp_path):
    import_model(folder, tmp_path / "unknown")
    with pytest.raises(ConfigError, match=r"names no training\.length, because its model was imported"):
        row_length(tmp_path / "unknown", read_json(tmp_path / "unknown" / "config.json"))
    import_model(folder, tmp_path / "known", length=16)
    assert row_length(tmp_path / "known", read_json(tmp_path / "known" / "config.json")) == 16
    with pytest.raises(ConfigError, match="--length is 33; use 2 to 32"):
        import_model(folder, tmp_path / "long", length=33)


@pytest.mark.parametrize(
    "template", ["{{ a }}", [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ a }}"}]]
)
def test_templates_and_end_tokens_of_older_folders_are_kept(folder, tmp_path, template):
    """Where the template is in tokenizer_config.json, and the ids of the ends are in config.json alone."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 5], "bos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    import_model(folder, tmp_path / "run")
    assert (tmp_path / "run" / "chat_template.jinja").read_text() == "{{ a }}"
    assert read_json(tmp_path / "run" / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    (folder / "chat_template.jinja").write_text("newer")
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    import_model(folder, tmp_path / "newer")
    assert (tmp_path / "newer" / "chat_template.jinja").read_text() == "newer"
    assert read_json(tmp_path / "newer" / "generation_config.json") == {"eos_token_id": 3}


def test_nothing_is_overwritten(folder, run, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(RunError, match="exists already"):
        import_model(folder, tmp_path / "there")
    with pytest.raises(RunError, match="exists already"):
        export_model(run, tmp_path / "there")


def test_tied_weights_that_differ_are_refused(folder, tmp_path):
    change_settings(tie_word_embeddings=True)(folder)
    with pytest.raises(RunError, match="is not the embedding"):
        import_model(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG, "LlamaForCausalLM"),
        (CONFIG.replace(layer_dropout=LayerDropout(rate=0.1), scan=True, dtype="bfloat16"), "LlamaForCausalLM"),
        (CONFIG.with_blocks(mlp=MoE(n_experts=4, d_expert=16, bias_rate=0.0)), "MixtralForCausalLM"),
    ],
)
def test_a_plan_is_made_before_training(config, name):
    plan = classify(config)
    assert isinstance(plan, ExportPlan)
    assert plan.architecture.name == name
    assert bool(plan.notes) == bool(config.layer_dropout.rate)


def test_a_model_that_nobody_else_has_is_refused_with_the_field():
    routed = CONFIG.with_blocks(depth=MixtureOfDepths(capacity=0.5))
    refusal = classify(routed)
    assert isinstance(refusal, Refusal)
    assert "depth" in refusal.reason
    assert refusal.alternatives


@pytest.mark.parametrize("change", [{"position": Rotary(scaling=LinearScaling(factor=2.0))}, {"window": 8}])
def test_what_the_fields_of_gguf_do_not_say_is_refused(run, tmp_path, change):
    attention = dataclasses.replace(CONFIG.pattern[0].attention, qkv_bias="window" in change, **change)
    copy = Path(shutil.copytree(run, tmp_path / "changed"))
    (copy / "config.json").write_text(json.dumps({"model": to_json(CONFIG.with_blocks(attention=attention))}))
    with pytest.raises(ConfigError, match="cannot be exported as GGUF"):
        export_gguf(copy, tmp_path / "model.gguf", "F16")
    assert not (tmp_path / "model.gguf").exists()


def test_an_export_of_such_a_model_names_the_run(run, tmp_path):
    routed = CONFIG.with_blocks(depth=MixtureOfDepths(capacity=0.5))
    copy = Path(shutil.copytree(run, tmp_path / "routed"))
    (copy / "config.json").write_text(json.dumps({"model": to_json(routed)}))
    with pytest.raises(ConfigError, match="cannot be exported"):
        export_model(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_bytes", [1, 200])
def test_blocks_of_any_size_give_the_same_model(run, tmp_path, monkeypatch, block_bytes):
    """Also where files hold two variables in one tensor (Phi-3), and experts one by one (Mixtral)."""
    monkeypatch.setattr("efftrain.train.checkpoints.streamed_arrays.BLOCK_BYTES", block_bytes)
    mlp = MoE(n_experts=3, top_k=2, d_expert=20, bias_rate=0)
    experts = CONFIG.replace(pattern=(dataclasses.replace(CONFIG.pattern[0], mlp=mlp),))
    for number, (config, model_type) in enumerate([(CONFIG, "phi3"), (experts, "mixtral")]):
        _, params, rest = split_model(Decoder(config, rngs=nnx.Rngs(1)))
        made, folder, again = (tmp_path / f"{name}{number}" for name in ("run", "folder", "again"))
        state = {"params": params, "model_state": rest}
        write_model_run(
            made,
            state,
            step=7,
            made_from=("import.json", {"architecture": model_type}),
            config={"model": to_json(config)},
        )
        assert export_model(made, folder).architecture.model_type == model_type
        import_model(folder, again)
        found = arrays(again)
        for name, array in arrays(made).items():
            np.testing.assert_array_equal(array, found[name])
