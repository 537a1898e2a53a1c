"""The fields of a config.json that describe a model: a superset, of which an architecture uses those that it reads."""

from typing import Any

from efftrain.config import to_json
from efftrain.errors import ConfigError
from efftrain.models.config import Attention, Dense, ModelConfig
from efftrain.models.moe.layer import MoE
from efftrain.models.positions import Rotary
from efftrain.models.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, LongRope, Yarn
from efftrain.models.soft_cap import SoftCap

ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SCALINGS = {
    LinearScaling: "linear",
    DynamicScaling: "dynamic",
    Llama3Scaling: "llama3",
    Yarn: "yarn",
    LongRope: "longrope",
}
RENAMED = {"original_length": "original_max_position_embeddings"}


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """Returns every field that some architecture may read; of fields that all layers share, those of the first layer.

    What a field cannot say is not looked at here: the settings are read back and compared with the model.

    Raises:
      ConfigError: a component is a fork's own.
    """
    first = config.layers[0]
    attention, mlp = first.attention, first.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, Dense | MoE):
        own = mlp if isinstance(attention, Attention) else attention
        raise ConfigError(f"{type(own).__name__} is a component that no other project has; export needs efftrain's own")
    windows = [getattr(block.attention, "window", None) for block in config.layers]
    window = next((w for w in windows if w is not None), None)
    kinds = ["full_attention" if w is None else "sliding_attention" for w in windows]
    eps, length = config.norm_eps, config.max_length
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "n_embd": config.d_model,
        "num_hidden_layers": config.n_layers,
        "n_layer": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "n_head": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.d_head,
        "max_position_embeddings": length,
        "n_positions": length,
        "rms_norm_eps": eps,
        "layer_norm_eps": eps,
        "layer_norm_epsilon": eps,
        "tie_word_embeddings": config.tied_embedding,
        "attention_bias": attention.qkv_bias,
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": config.n_layers if window is None else 0,
        "layer_types": kinds,
        "query_pre_attn_scalar": attention.d_head if attention.scale is None else _whole(attention.scale**-2),
        "attention_multiplier": attention.d_head**-0.5 if attention.scale is None else attention.scale,
        "attn_logit_softcapping": attention.score_mod.cap if isinstance(attention.score_mod, SoftCap) else None,
        "final_logit_softcapping": config.logit_softcap,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": 1 / config.logits_multiplier,
    }
    found = {name: value for name, value in (fields | _mlp(mlp) | _rope(config)).items() if value is not None}
    return found | {"sliding_window": window}  # also if there is none, because Mistral's default is one


def _mlp(mlp: Dense | MoE) -> dict[str, Any]:
    if isinstance(mlp, Dense):
        names = ("hidden_act", "hidden_activation", "activation_function")
        activation = ACTIVATIONS[mlp.activation]
        if mlp.activation == "gelu_tanh" and not mlp.gated:
            activation = "gelu_new"  # the same function, under the name that GPT-2 and Phi have for it
        shape = {"intermediate_size": mlp.d_ff, "n_inner": mlp.d_ff, "mlp_bias": mlp.bias}
        return dict.fromkeys(names, activation) | shape
    return {
        "hidden_act": "silu",
        "num_local_experts": mlp.n_experts,
        "num_experts": mlp.n_experts,
        "num_experts_per_tok": mlp.top_k,
        "intermediate_size": mlp.d_expert,
        "moe_intermediate_size": mlp.d_expert,
        "norm_topk_prob": mlp.gates_sum_to_one,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _whole(value: float) -> float:
    """The integer that rounding errors have moved the value from, or else the value."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Both the fields of transformers 5 and those of earlier versions, of each kind of layer that differs."""
    kinds: dict[str, dict[str, Any]] = {}
    for block in config.layers:
        attention = block.attention
        if isinstance(attention, Attention) and isinstance(attention.position, Rotary):
            kind = "full_attention" if attention.window is None else "sliding_attention"
            kinds.setdefault(kind, {"rope_theta": attention.rope_theta} | _rotary(attention.position))
    if not kinds:
        return {}
    one = kinds.get("full_attention") or next(iter(kinds.values()))
    if len(set(map(str, kinds.values()))) > 1:
        return {"rope_parameters": kinds}
    fraction = one.get("partial_rotary_factor", 1.0)
    scaling = {k: v for k, v in one.items() if k not in ("rope_theta", "partial_rotary_factor")}
    more = {} if fraction == 1 else {"partial_rotary_factor": fraction}
    old = {} if scaling["rope_type"] == "default" else {"rope_scaling": scaling}
    if (original := "original_max_position_embeddings") in one:
        more |= {original: one[original]}  # Phi-3 reads it here, and takes 4096 if it is missing
    return {"rope_parameters": one, "rope_theta": one["rope_theta"]} | more | old


def _rotary(position: Rotary) -> dict[str, Any]:
    found: dict[str, Any] = {} if position.fraction == 1 else {"partial_rotary_factor": position.fraction}
    if position.scaling is None:
        return found | {"rope_type": "default"}
    kind = SCALINGS.get(type(position.scaling))
    if kind is None:
        raise ConfigError(f"attention.position.scaling is {type(position.scaling).__name__}, which cannot be exported")
    values = {RENAMED.get(name, name): value for name, value in to_json(position.scaling).items() if name != "type"}
    return found | {"rope_type": kind} | {name: value for name, value in values.items() if value is not None}
