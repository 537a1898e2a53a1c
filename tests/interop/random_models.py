"""Small random models of transformers, of every architecture that efftrain imports, with odd shapes on purpose."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 131  # no multiple of anything, so that a transposed matrix has another shape

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
# Every prompt of the tests is longer than the original length, up to which transformers takes the short factors.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 2.0, 2.5],
    "long_factor": [1.0, 1.3, 2.0, 5.0, 11.0, 20.0],
    "original_max_position_embeddings": 12,
}
WINDOWS = ["sliding_attention", "full_attention"]

# name -> (configuration class, fields that differ from COMMON; None: the class has no such field)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, one KV head, tied": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, 3 query heads a KV head, biases": (
        "LlamaConfig",
        {
            "hidden_size": 54,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama, all heads, llama3": ("LlamaConfig", {"num_key_value_heads": 4, "rope_parameters": LLAMA3}),
    "llama, linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama, dynamic": (  # up to the original length, beyond which efftrain refuses it
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 100, "head_dim": 6}),
    "qwen2": ("Qwen2Config", {"head_dim": None, "num_attention_heads": 8}),
    "qwen2, windows": (
        "Qwen2Config",
        {"head_dim": None, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 18}),
    "gemma": ("GemmaConfig", {"tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        {
            "tie_word_embeddings": True,
            "sliding_window": 64,
            "layer_types": WINDOWS,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"tie_word_embeddings": True, "sliding_window": 64, "layer_types": WINDOWS, "query_pre_attn_scalar": 24},
    ),
    "olmo2": ("Olmo2Config", {"head_dim": None}),
    "gpt2": (
        "GPT2Config",
        {
            "n_embd": 45,
            "n_layer": 2,
            "n_head": 3,
            "n_positions": 1024,
            "n_inner": 88,
            **{name: None for name in COMMON if name not in ("vocab_size", "bos_token_id", "eos_token_id")},
        },
    ),
    "phi": (
        "PhiConfig",
        {
            "head_dim": None,
            "hidden_size": 60,
            "num_key_value_heads": 4,
            "rope_parameters": {"partial_rotary_factor": 0.4, "rope_theta": 1e4, "rope_type": "default"},
        },
    ),
    "phi3": ("Phi3Config", {"head_dim": None, "sliding_window": 100}),
    "phi3, longrope": (
        "Phi3Config",
        {"head_dim": None, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 12},
    ),
    "granite": (
        "GraniteConfig",
        {
            "head_dim": None,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
            "logits_scaling": 2.0,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True},
    ),
    "qwen3 moe, gates as they are": (
        "Qwen3MoeConfig",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": False},
    ),
    "olmoe": ("OlmoeConfig", {"head_dim": None, "num_experts": 5, "num_experts_per_tok": 2}),
}


def configuration(name: str, **fields: Any) -> Any:
    """Returns the configuration of a model of transformers, with some fields changed."""
    kind, own = MODELS[name]
    values = {key: value for key, value in (COMMON | own).items() if value is not None}
    return getattr(transformers, kind)(**copy.deepcopy(values | fields))


def make(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Saves a random model into a folder and returns it; no parameter is at its usual start, so each one counts."""
    torch.manual_seed(0)
    config = configuration(name, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                around = 0.0 if path.endswith("bias") or "gemma" in name else 1.0
                parameter.copy_(around + 0.3 * torch.randn_like(parameter))
            else:
                fan_in = parameter.shape[-1] if "gpt2" not in name else parameter.shape[0]
                scale = 1.0 if "embed" in path or "wte" in path or "wpe" in path else 1.3 * fan_in**-0.5
                parameter.copy_(scale * torch.randn_like(parameter))
    model = model.to(dtype)
    model.save_pretrained(folder)
    return model
