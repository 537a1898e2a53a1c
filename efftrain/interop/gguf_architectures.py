"""The architectures of llama.cpp that are read from GGUF files, one small table each, and its conventions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# Name in llama.cpp -> name in transformers, of the architectures that share Llama's names.
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
PRE_NORM = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
POST_NORM = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
SANDWICH = POST_NORM | {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
LAYER = PRE_NORM | ATTENTION | MLP
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
    "ffn_up_exps": "mlp.experts.{expert}.up_proj",
    "ffn_down_exps": "mlp.experts.{expert}.down_proj",
}
MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2",
}
# Field in llama.cpp, after the name of the architecture -> field in transformers.
FIELDS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "rope.freq_base": "rope_theta",
}
GPT2_FIELDS = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
EXPERT_FIELDS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}


@dataclass(frozen=True, kw_only=True)
class GgufArchitecture:
    """An architecture of llama.cpp.

    Attributes:
      model_type: that of transformers.
      names: module of a layer -> module in transformers. A name with ``{expert}`` has a module for each expert, which
        are the slices of one tensor.
      outer: module outside of the layers -> module in transformers.
      layer: start of the names of a layer's modules in transformers.
      fields: field, after the name of the architecture -> field in transformers.
      fixed: fields of transformers that every such file implies if it does not say otherwise.
      more: returns further fields of transformers from those that were read.
      interleaved: llama.cpp rotates neighbouring rows of queries and keys together, see ``gguf_file.llama_rows``.
      norm_shift: the scales of norms are stored with this number added.
      transposed: matrices are (d_out, d_in) in the file and (d_in, d_out) in transformers.
    """

    model_type: str
    names: Mapping[str, str] = field(default_factory=lambda: LAYER)
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    layer: str = "model.layers."
    fields: Mapping[str, str] = field(default_factory=lambda: FIELDS)
    fixed: Mapping[str, Any] = field(default_factory=lambda: {"hidden_act": "silu"})
    more: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: {}
    interleaved: bool = False
    norm_shift: float = 0.0
    transposed: bool = False


def _gemma2(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    n = fields["num_hidden_layers"]
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(n)]
    return {"layer_types": kinds, "query_pre_attn_scalar": _score_width(fields, of_27b=46)}


def _gemma3(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    local = (lambda layer: (layer + 1) % 6) if fields.get("sliding_window") else (lambda layer: False)
    kinds = ["sliding_attention" if local(i) else "full_attention" for i in range(fields["num_hidden_layers"])]
    return {"layer_types": kinds, "query_pre_attn_scalar": _score_width(fields, of_27b=62)}


def _score_width(fields: Mapping[str, Any], *, of_27b: int) -> int:
    """The number whose root divides the scores. llama.cpp recognises the model of 27B by its number of layers."""
    share = fields["hidden_size"] // fields["num_attention_heads"]
    return share if fields["num_hidden_layers"] == of_27b else fields.get("head_dim", share)


_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GATES_OF_ALL = {"hidden_act": "silu", "norm_topk_prob": False}
_GATES_SUM_TO_ONE = {"hidden_act": "silu", "norm_topk_prob": True}

ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture(model_type="llama", interleaved=True),
    "qwen2": GgufArchitecture(model_type="qwen2"),
    "qwen3": GgufArchitecture(model_type="qwen3"),
    "qwen3moe": GgufArchitecture(
        model_type="qwen3_moe",
        names=PRE_NORM | ATTENTION | EXPERTS,
        fields=FIELDS | EXPERT_FIELDS | {"expert_feed_forward_length": "moe_intermediate_size"},
        fixed=_GATES_SUM_TO_ONE,
    ),
    "olmoe": GgufArchitecture(
        model_type="olmoe",
        names=PRE_NORM | ATTENTION | EXPERTS,
        fields=FIELDS | EXPERT_FIELDS,
        fixed=_GATES_OF_ALL,
    ),
    "olmo2": GgufArchitecture(model_type="olmo2", names=POST_NORM | ATTENTION | MLP),
    "granite": GgufArchitecture(
        model_type="granite",
        fields=FIELDS
        | {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        interleaved=True,
    ),
    "gemma": GgufArchitecture(model_type="gemma", fixed={"hidden_act": "gelu_pytorch_tanh"}, norm_shift=1.0),
    "gemma2": GgufArchitecture(
        model_type="gemma2",
        names=SANDWICH | ATTENTION | MLP,
        fields=FIELDS | _WINDOW | _CAPS,
        fixed=_GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096},
        more=_gemma2,
        norm_shift=1.0,
    ),
    "gemma3": GgufArchitecture(
        model_type="gemma3_text",
        names=SANDWICH | ATTENTION | MLP,
        fields=FIELDS | _WINDOW | _CAPS | {"rope.freq_base_swa": "rope_local_base_freq"},
        fixed=_GEMMA | {"rope_local_base_freq": 10_000.0},
        more=_gemma3,
        norm_shift=1.0,
    ),
    "phi3": GgufArchitecture(
        model_type="phi3",
        names=PRE_NORM
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        fields=FIELDS | _WINDOW,
    ),
    "gpt2": GgufArchitecture(
        model_type="gpt2",
        names={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layer="transformer.h.",
        fields=GPT2_FIELDS,
        fixed={"activation_function": "gelu_new"},
        transposed=True,
    ),
}
# Llama with experts has the name "llama" in llama.cpp too.
LLAMA_EXPERTS = GgufArchitecture(
    model_type="mixtral",
    names=PRE_NORM | ATTENTION | MIXTRAL,
    fields=FIELDS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    interleaved=True,
)
