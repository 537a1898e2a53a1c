"""The foreign architectures that efftrain imports and exports, one table each."""

from collections.abc import Mapping
from typing import Any

from efftrain.errors import ConfigError
from efftrain.interop.architecture import Architecture
from efftrain.interop.reading import (
    dense,
    experts,
    model,
    self_attention,
    windows,
)
from efftrain.interop.settings import Settings
from efftrain.models.config import BlockConfig, ModelConfig
from efftrain.models.norms import RMS, LayerNorm
from efftrain.models.residual import Parallel, PostNorm, Sandwich

ATTENTION = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
}
MLP = {"mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj"}
PRE_NORM = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
LAYER = "model.layers.{layer}."
EXPERTS = {
    "mlp/router": "mlp.gate",
    "mlp/gate": "mlp.experts.{expert}.gate_proj",
    "mlp/up": "mlp.experts.{expert}.up_proj",
    "mlp/down": "mlp.experts.{expert}.down_proj",
}


def _llama(s: Settings) -> ModelConfig:
    s.require("clip_qkv", None)
    bias = s.flag("attention_bias")
    attention = self_attention(s, qkv_bias=bias, out_bias=bias)
    return model(s, [BlockConfig(attention=attention, mlp=dense(s, bias=s.flag("mlp_bias")))])


def _mistral(s: Settings) -> ModelConfig:
    attention = self_attention(s, window=s.get("sliding_window"))
    return model(s, [BlockConfig(attention=attention, mlp=dense(s))])


def _qwen2(s: Settings) -> ModelConfig:
    mlp = dense(s)
    return model(s, [BlockConfig(attention=self_attention(s, qkv_bias=True, window=w), mlp=mlp) for w in windows(s)])


def _qwen3(s: Settings) -> ModelConfig:
    bias, mlp = s.flag("attention_bias"), dense(s)
    layers = [
        BlockConfig(attention=self_attention(s, qk_norm=True, qkv_bias=bias, out_bias=bias, window=w), mlp=mlp)
        for w in windows(s)
    ]
    return model(s, layers)


def _qwen3_moe(s: Settings) -> ModelConfig:
    s.require("decoder_sparse_step", 1, default=1)
    s.require("mlp_only_layers", [], default=[])
    s.get("intermediate_size")  # of layers without experts, which there are none of
    bias = s.flag("attention_bias")
    window = s.get("sliding_window") if s.flag("use_sliding_window") else None
    s.get("sliding_window")
    attention = self_attention(s, qk_norm=True, qkv_bias=bias, out_bias=bias, window=window)
    number = "num_local_experts" if "num_local_experts" in s else "num_experts"
    mlp = experts(s, n_experts=number, width="moe_intermediate_size", renormalize=s.flag("norm_topk_prob"))
    return model(s, [BlockConfig(attention=attention, mlp=mlp)])


def _mixtral(s: Settings) -> ModelConfig:
    attention = self_attention(s, window=s.get("sliding_window"))
    mlp = experts(s, n_experts="num_local_experts", width="intermediate_size", renormalize=True)
    return model(s, [BlockConfig(attention=attention, mlp=mlp)])


def _olmoe(s: Settings) -> ModelConfig:
    s.require("clip_qkv", None)
    bias = s.flag("attention_bias")
    attention = self_attention(s, qk_norm="full", qkv_bias=bias, out_bias=bias)
    mlp = experts(s, n_experts="num_experts", width="intermediate_size", renormalize=s.flag("norm_topk_prob"))
    return model(s, [BlockConfig(attention=attention, mlp=mlp)])


def _olmo2(s: Settings) -> ModelConfig:
    bias = s.flag("attention_bias")
    attention = self_attention(s, qk_norm="full", qkv_bias=bias, out_bias=bias)
    return model(s, [BlockConfig(attention=attention, mlp=dense(s), residual=PostNorm())])


def _gemma(s: Settings) -> ModelConfig:
    s.require("use_bidirectional_attention", None, False)
    s.get("hidden_activation")
    bias = s.flag("attention_bias")
    attention = self_attention(s, qkv_bias=bias, out_bias=bias)
    mlp = dense(s, activation="gelu_tanh" if s.get("hidden_act") == "gelu" else None)
    return model(s, [BlockConfig(attention=attention, mlp=mlp)], norm=RMS(zero_centered=True), scaled_embedding=True)


def _gemma23(s: Settings, *, qk_norm: bool) -> ModelConfig:
    s.require("use_bidirectional_attention", None, False)
    bias, mlp = s.flag("attention_bias"), dense(s, activation_field="hidden_activation")
    scale = s.number("query_pre_attn_scalar", 256) ** -0.5
    layers = [
        BlockConfig(
            attention=self_attention(
                s,
                qk_norm=qk_norm,
                qkv_bias=bias,
                out_bias=bias,
                window=window,
                scale=scale,
                soft_cap=s.get("attn_logit_softcapping"),
                kind="full_attention" if window is None else "sliding_attention",
            ),
            mlp=mlp,
            residual=Sandwich(),
        )
        for window in windows(s)
    ]
    return model(
        s,
        layers,
        norm=RMS(zero_centered=True),
        scaled_embedding=True,
        logit_softcap=s.get("final_logit_softcapping"),
    )


def _gpt2(s: Settings) -> ModelConfig:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        s.require(name, False, default=False)
    s.require("scale_attn_weights", True, default=True)
    width = s.count("n_embd")
    attention = self_attention(s, heads="n_head", width="n_embd", qkv_bias=True, out_bias=True, rotary=False)
    mlp = dense(s, d_ff=s.count("n_inner", 4 * width), activation_field="activation_function", gated=False, bias=True)
    return model(
        s,
        [BlockConfig(attention=attention, mlp=mlp)],
        layers_field="n_layer",
        width="n_embd",
        length="n_positions",
        eps="layer_norm_epsilon",
        norm=LayerNorm(),
        learned_positions=True,
        tied_default=True,
    )


def _phi(s: Settings) -> ModelConfig:
    s.require("qk_layernorm", False, default=False)
    attention = self_attention(s, qkv_bias=True, out_bias=True)
    block = BlockConfig(attention=attention, mlp=dense(s, gated=False, bias=True), residual=Parallel(shared_norm=True))
    return model(s, [block], eps="layer_norm_eps", norm=LayerNorm(), head_bias=True)


def _phi3(s: Settings) -> ModelConfig:
    s.get("original_max_position_embeddings")
    attention = self_attention(s, window=s.get("sliding_window"))
    return model(s, [BlockConfig(attention=attention, mlp=dense(s))])


def _granite(s: Settings) -> ModelConfig:
    bias = s.flag("attention_bias")
    attention = self_attention(s, qkv_bias=bias, out_bias=bias, scale=s.number("attention_multiplier", 1.0))
    return model(
        s,
        [BlockConfig(attention=attention, mlp=dense(s, bias=s.flag("mlp_bias")))],
        embedding_multiplier=s.number("embedding_multiplier", 1.0),
        residual_multiplier=s.number("residual_multiplier", 1.0),
        logits_multiplier=1 / s.number("logits_scaling", 1.0),
    )


def _architecture(name: str, model_type: str, to_config: Any, names: Mapping[str, str], **more: Any) -> Architecture:
    fields: dict[str, Any] = {"outer": OUTER, "layer": LAYER, "no_parameters": ("rotary_emb.inv_freq",)} | more
    return Architecture(
        name=name,
        model_type=model_type,
        to_config=to_config,
        names=names,
        **fields,
    )


SANDWICH = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
POST_NORM = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        _architecture("LlamaForCausalLM", "llama", _llama, PRE_NORM | ATTENTION | MLP),
        _architecture("MistralForCausalLM", "mistral", _mistral, PRE_NORM | ATTENTION | MLP),
        _architecture("Qwen2ForCausalLM", "qwen2", _qwen2, PRE_NORM | ATTENTION | MLP),
        _architecture("Qwen3ForCausalLM", "qwen3", _qwen3, PRE_NORM | ATTENTION | MLP),
        _architecture("Qwen3MoeForCausalLM", "qwen3_moe", _qwen3_moe, PRE_NORM | ATTENTION | EXPERTS),
        _architecture(
            "MixtralForCausalLM",
            "mixtral",
            _mixtral,
            PRE_NORM
            | ATTENTION
            | {
                "mlp/router": "block_sparse_moe.gate",
                "mlp/gate": "block_sparse_moe.experts.{expert}.w1",
                "mlp/up": "block_sparse_moe.experts.{expert}.w3",
                "mlp/down": "block_sparse_moe.experts.{expert}.w2",
            },
        ),
        _architecture("OlmoeForCausalLM", "olmoe", _olmoe, PRE_NORM | ATTENTION | EXPERTS),
        _architecture("Olmo2ForCausalLM", "olmo2", _olmo2, POST_NORM | ATTENTION | MLP),
        _architecture("GemmaForCausalLM", "gemma", _gemma, PRE_NORM | ATTENTION | MLP),
        _architecture("Gemma2ForCausalLM", "gemma2", lambda s: _gemma23(s, qk_norm=False), SANDWICH | ATTENTION | MLP),
        _architecture(
            "Gemma3ForCausalLM", "gemma3_text", lambda s: _gemma23(s, qk_norm=True), SANDWICH | ATTENTION | MLP
        ),
        _architecture("GraniteForCausalLM", "granite", _granite, PRE_NORM | ATTENTION | MLP),
        _architecture(
            "GPT2LMHeadModel",
            "gpt2",
            _gpt2,
            {
                "attention_norm": "ln_1",
                "attention/query": "attn.c_attn",
                "attention/key": "attn.c_attn",
                "attention/value": "attn.c_attn",
                "attention/out": "attn.c_proj",
                "mlp_norm": "ln_2",
                "mlp/up": "mlp.c_fc",
                "mlp/down": "mlp.c_proj",
            },
            outer={
                "embedding": "transformer.wte",
                "positions": "transformer.wpe",
                "norm": "transformer.ln_f",
                "head": "lm_head",
            },
            layer="transformer.h.{layer}.",
            transposed=False,
            no_parameters=("attn.bias", "attn.masked_bias"),
        ),
        _architecture(
            "PhiForCausalLM",
            "phi",
            _phi,
            {
                "attention_norm": "input_layernorm",
                "attention/query": "self_attn.q_proj",
                "attention/key": "self_attn.k_proj",
                "attention/value": "self_attn.v_proj",
                "attention/out": "self_attn.dense",
                "mlp/up": "mlp.fc1",
                "mlp/down": "mlp.fc2",
            },
            outer=OUTER | {"norm": "model.final_layernorm"},
        ),
        _architecture(
            "Phi3ForCausalLM",
            "phi3",
            _phi3,
            PRE_NORM
            | {
                "attention/query": "self_attn.qkv_proj",
                "attention/key": "self_attn.qkv_proj",
                "attention/value": "self_attn.qkv_proj",
                "attention/out": "self_attn.o_proj",
                "mlp/gate": "mlp.gate_up_proj",
                "mlp/up": "mlp.gate_up_proj",
                "mlp/down": "mlp.down_proj",
            },
        ),
    )
}


# Fields of architectures that are asked for and do not fit.
UNFIT = {
    "gpt_oss": "swiglu_limit (a clamped gate), the biases of its experts and of their router, and its weights in MXFP4 "
    "have no place in efftrain's experts",
}


def architecture_of(settings: Settings) -> Architecture:
    """Returns the table of a model's architecture.

    Raises:
      ConfigError: there is none.
    """
    model_type = settings.get("model_type")
    if model_type in UNFIT:
        raise ConfigError(f"{settings.origin}: model_type is {model_type!r}; {UNFIT[model_type]}")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"{settings.origin}: model_type is {model_type!r}; efftrain imports {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[model_type]
