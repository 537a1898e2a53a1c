"""Writes a model of transformers as llama.cpp's converter does, with the names and fields of the package gguf."""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import plain_bpe
from gguf_files import write

TOKENS = ["<|end|>", *plain_bpe.byte_characters().values(), "ab"]
NAMES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
PERMUTED = ("llama", "granite")


def write_model(path: Path, model: Any, rope_freqs: np.ndarray | None = None) -> None:
    """Writes a model in float32.

    Args:
      path: the file.
      model: a model whose vocabulary is ``TOKENS``.
      rope_freqs: divisors of the rotary frequencies, which the converter writes for Llama 3.1.
    """
    config = model.config
    name = NAMES.get(config.model_type, config.model_type)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(path, name)
    _fields(writer, config, llama3=rope_freqs is not None)
    _tokenizer(writer)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    for key, array in state.items():
        module, _, leaf = key.rpartition(".")
        if key.endswith("experts.gate_up_proj"):
            layer = key.split(".")[2]
            gate, up = np.split(array, 2, axis=1)
            writer.add_tensor(f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(gate))
            writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(up))
        elif key.endswith("experts.down_proj"):
            writer.add_tensor(f"{names.get_name(key)}.weight", array)
        else:
            theirs = names.get_name(module)
            assert theirs is not None, key
            writer.add_tensor(f"{theirs}.{leaf}", _converted(array, theirs, name, config))
    scaling = getattr(config, "rope_parameters", None) or {}
    if scaling.get("rope_type") == "longrope":
        for size in ("long", "short"):
            factors = np.asarray(scaling[f"{size}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{size}.weight", factors)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs)
    write(writer)


def _converted(array: np.ndarray, module: str, name: str, config: Any) -> np.ndarray:
    part = module.split(".")[-1]
    if name in PERMUTED and part in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    if name.startswith("gemma") and part.endswith("norm"):
        return array + 1
    if name == "gpt2" and part in ("attn_qkv", "attn_output", "ffn_up", "ffn_down") and array.ndim == 2:
        return np.ascontiguousarray(array.T)
    return array


def _fields(writer: gguf.GGUFWriter, config: Any, *, llama3: bool) -> None:
    writer.add_name("a model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type != "phi3":
        writer.add_key_length(d_head)
        writer.add_value_length(d_head)
    rope = config.rope_parameters
    scaling = rope.get("full_attention", rope)
    if config.model_type != "gemma":
        writer.add_rope_freq_base(scaling["rope_theta"])
    writer.add_rope_dimension_count(int(d_head * scaling.get("partial_rotary_factor", 1.0)))
    _rope_scaling(writer, config, scaling, llama3)
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if (used := getattr(config, "num_experts_per_tok", None)) is not None:
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(used)
    if config.model_type == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _rope_scaling(writer: gguf.GGUFWriter, config: Any, scaling: dict, llama3: bool) -> None:
    kind, longest = scaling["rope_type"], config.max_position_embeddings
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    if config.model_type == "phi3":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longest / original) / math.log(original)))
    assert kind in ("default", "linear", "yarn", "longrope") or llama3


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
