"""GGUF files of every architecture compute what the model of transformers computes that they were converted from."""

from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from gguf_files import write

torch = pytest.importorskip("torch", reason="needs the extra interop-test")
transformers = pytest.importorskip("transformers", reason="needs the extra interop-test")

import random_models  # noqa: E402 - needs torch
from gguf_models import NAMES, TOKENS, write_model  # noqa: E402
from random_models import LLAMA3, YARN  # noqa: E402

import efftrain  # noqa: E402
from efftrain.errors import ConfigError, EfftrainError  # noqa: E402
from efftrain.interop.gguf_architectures import ARCHITECTURES  # noqa: E402
from efftrain.interop.import_model import import_model  # noqa: E402

IDS = np.random.default_rng(3).integers(0, len(TOKENS), (1, 300)).astype(np.int32)

# name -> (random model, fields that differ from it). llama.cpp knows the scale of Gemma's scores by the size of a head,
# which layers of it have windows by their number, and whether the gates of experts sum to one by the architecture.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama, 3 query heads a KV head, biases", {}),
    "llama, one KV head, tied": ("llama, one KV head, tied", {}),
    "llama 3.1": ("llama, all heads, llama3", {}),
    "llama, linear": ("llama, linear", {}),
    "mixtral": ("mixtral", {}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 moe": ("qwen3 moe", {}),
    "olmoe": ("olmoe", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "layer_types": [*["sliding_attention"] * 5, "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, longrope": ("phi3, longrope", {}),
    "gpt2": ("gpt2", {"n_inner": 180}),
}
# Of the others, transformers reads no sizes of heads or experts, or nothing.
READ_BY_TRANSFORMERS = ("llama", "llama, one KV head, tied", "qwen2, yarn", "gemma2", "gemma3", "gpt2")


def llama3_divisors(d_head: int, theta: float) -> np.ndarray:
    """As llama.cpp's converter computes them (Llama 3.1's own formula)."""
    frequencies = theta ** -(np.arange(0, d_head, 2, dtype=np.float64) / d_head)
    low, high, factor = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"], LLAMA3["factor"]
    original = LLAMA3["original_max_position_embeddings"]
    found = []
    for length in 2 * np.pi / frequencies:
        if length < original / high:
            found.append(1.0)
        elif length > original / low:
            found.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.asarray(found, np.float32)


def test_every_architecture_is_tried():
    kinds = {getattr(transformers, random_models.MODELS[model][0]).model_type for model, _ in MODELS.values()}
    assert {NAMES.get(kind, kind) for kind in kinds} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_gguf_file_is_the_model_that_it_was_converted_from(name, tmp_path):
    model, fields = MODELS[name]
    theirs = random_models.make(model, tmp_path / "theirs", vocab_size=len(TOKENS), **fields)
    rope_freqs = llama3_divisors(16, 1e4) if name == "llama 3.1" else None
    write_model(tmp_path / "model.gguf", theirs, rope_freqs)
    if name in READ_BY_TRANSFORMERS:  # another reader finds the same weights
        read = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32
        ).state_dict()
        for key, tensor in theirs.state_dict().items():
            np.testing.assert_allclose(read[key], tensor, rtol=1e-6, atol=1e-6, err_msg=key)
    import_model(tmp_path / "model.gguf", tmp_path / "run")
    graph, state = nnx.split(efftrain.load(tmp_path / "run"))
    ours = np.asarray(jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(IDS)))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    assert np.abs(ours - logits).max() / logits.std() < 1e-4


@pytest.mark.parametrize(
    ("name", "fields", "width"),
    [
        ("gemma2", {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}, 144),
        ("gemma2", {"num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256}, 256),
        ("gemma3", {"num_hidden_layers": 62, "hidden_size": 5376, "num_attention_heads": 32, "head_dim": 128}, 168),
        ("gemma3", {"num_hidden_layers": 26, "hidden_size": 1152, "num_attention_heads": 4, "head_dim": 256}, 256),
    ],
)
def test_the_scale_of_published_gemmas_is_that_of_their_configuration(name, fields, width):
    """``query_pre_attn_scalar`` in the config.json of Gemma 2 27B and 9B, and of Gemma 3 27B and 1B."""
    assert ARCHITECTURES[name].more(fields)["query_pre_attn_scalar"] == width


def written(path, change) -> None:
    """Writes the head of a Llama, with changes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", np.zeros((4, 16), np.float32))
    change(writer)
    write(writer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_tensor("blk.0.attn_sinks.weight", np.zeros(2, np.float32)), "blk.0.attn_sinks.weight"),
        (lambda w: w.add_tensor("blk.0.ffn_gate.0.weight", np.zeros((8, 16), np.float32)), "blk.0.ffn_gate.0.weight"),
        (lambda w: w.add_string("llama.rope.scaling.type", "su"), "rope.scaling.type is 'su'"),
        (lambda w: w.add_rope_scaling_attn_factors(1.5), "rope.scaling.attn_factor is 1.5"),
        (lambda w: w.add_float32("llama.rope.scaling.yarn_ext_factor", 2.0), "rope.scaling.yarn_ext_factor is 2.0"),
        (lambda w: w.add_rope_dimension_count(9), "rope.dimension_count is 9, and a head has 8 channels"),
        (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, np.float32)), "beside rope_factors_long.weight"),
    ],
)
def test_what_a_file_has_and_efftrain_does_not_know_is_named(tmp_path, change, message):
    written(tmp_path / "model.gguf", change)
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "model.gguf", tmp_path / "run")


def test_experts_that_are_no_matrices_are_refused(tmp_path):
    def experts(writer):
        writer.add_expert_count(2)
        writer.add_tensor("blk.0.ffn_up_exps.weight", np.zeros(16, np.float32))

    written(tmp_path / "model.gguf", experts)
    with pytest.raises(EfftrainError, match=r"blk.0.ffn_up_exps.weight has the shape \(16,\); convert the model again"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")


def test_a_field_that_is_missing_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.add_embedding_length(16)
    writer.add_head_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 16), np.float32))
    write(writer)
    with pytest.raises(EfftrainError, match=r"has no field gemma2\.block_count; convert the model again"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")


@pytest.mark.parametrize("name", ["phi2", "deepseek2", "gpt-oss"])
def test_other_architectures_are_refused_by_name(tmp_path, name):
    write(gguf.GGUFWriter(tmp_path / "model.gguf", name))
    with pytest.raises(EfftrainError, match=f"general.architecture is '{name}'; efftrain reads llama, qwen2, qwen3"):
        import_model(tmp_path / "model.gguf", tmp_path / "run")
