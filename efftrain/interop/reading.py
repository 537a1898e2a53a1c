"""Parts of a model's configuration, read from the fields that the architectures of transformers share."""

import math
from collections.abc import Sequence
from typing import Any

from efftrain.interop.architecture import repeated
from efftrain.interop.settings import Settings
from efftrain.models.components import NormConfig, PositionConfig
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.moe.layer import MoE
from efftrain.models.positions import NoPosition, Rotary
from efftrain.models.rope_scaling import DynamicScaling, LinearScaling, Llama3Scaling, LongRope, Yarn
from efftrain.models.soft_cap import SoftCap
from efftrain.ops.rope import long_rope_attention_factor

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def self_attention(
    s: Settings,
    *,
    heads: str = "num_attention_heads",
    width: str = "hidden_size",
    window: int | None = None,
    soft_cap: float | None = None,
    kind: str | None = None,
    rotary: bool = True,
    **fields: Any,
) -> Attention:
    """Reads attention with the heads, positions and ``fields`` of an architecture; ``kind`` is that of its layer."""
    n_heads = s.count(heads)
    d_head = s.count("head_dim", s.count(width) // n_heads)
    theta, position = rope(s, kind) if rotary else (10_000.0, NoPosition())
    return Attention(
        n_heads=n_heads,
        n_kv_heads=s.count("num_key_value_heads", n_heads),
        d_head=d_head,
        window=window,
        rope_theta=theta,
        position=position,
        score_mod=None if soft_cap is None else SoftCap(cap=float(soft_cap)),
        **fields,
    )


def rope(s: Settings, kind: str | None = None) -> tuple[float, PositionConfig]:
    """Reads base and encoding of rotary positions, from ``rope_parameters`` or from the fields of earlier versions."""
    parts = s.part("rope_parameters")
    if parts is not None and kind is not None and kind in parts:
        parts = parts.part(kind)
    old = s.part("rope_scaling")
    scaling = parts if parts is not None else old
    local = kind == "sliding_attention" and parts is None and "rope_local_base_freq" in s
    theta = s.number("rope_theta", 10_000.0)
    local_theta = s.number("rope_local_base_freq", theta)
    if parts is not None:
        theta = parts.number("rope_theta", theta)
    elif local:
        theta, scaling = local_theta, None
    fraction = s.number("partial_rotary_factor", 1.0)
    if scaling is not None:
        fraction = scaling.number("partial_rotary_factor", fraction)
    return float(theta), Rotary(fraction=float(fraction), scaling=None if scaling is None else _scaling(s, scaling))


def _scaling(s: Settings, r: Settings) -> Any:
    kind = r.get("rope_type", r.get("type", "default"))
    r.get("type")
    longest = s.count("max_position_embeddings")
    inner = r.number("original_max_position_embeddings", longest)
    length = s.number("original_max_position_embeddings", inner)  # the outer one counts in transformers
    found: Any = None
    match kind:
        case "default" | "mrope":
            found = None
        case "linear":
            found = LinearScaling(factor=float(r.number("factor")))
        case "dynamic":
            found = DynamicScaling(factor=float(r.number("factor")), original_length=int(length))
        case "llama3":
            found = Llama3Scaling(
                factor=float(r.number("factor")),
                low_freq_factor=float(r.number("low_freq_factor")),
                high_freq_factor=float(r.number("high_freq_factor")),
                original_length=int(length),
            )
        case "yarn":
            found = Yarn(factor=float(r.number("factor")), original_length=int(length), **_yarn(r))
        case "longrope" | "su":
            found = LongRope(
                short_factor=tuple(map(float, r.get("short_factor", ()))),
                long_factor=tuple(map(float, r.get("long_factor", ()))),
                original_length=int(length),
                attention_factor=_long_rope_factor(r, longest, int(length)),
            )
        case _:
            raise r.refusal("rope_type", "only default, linear, dynamic, llama3, yarn and longrope can be imported")
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "factor"):
        r.get(name)
    r.check_all_read()
    return found


def _long_rope_factor(r: Settings, longest: int, length: int) -> float:
    """The factor of queries and keys for texts of every length, which does not change with the length of an import."""
    factor = r.number("factor", longest / length)
    return float(r.number("attention_factor", long_rope_attention_factor(factor, length)))


def _yarn(r: Settings) -> dict[str, Any]:
    names = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": None, "mscale": None, "mscale_all_dim": None}
    found = {name: r.get(name, default) for name, default in names.items()}
    found = {name: None if value is None else float(value) for name, value in found.items()}
    return found | {"truncate": r.flag("truncate", True)}


def windows(s: Settings) -> list[int | None]:
    """Reads the window of every layer: number of latest tokens that it sees; None: all."""
    n, size = s.count("num_hidden_layers"), s.get("sliding_window")
    used = s.flag("use_sliding_window", size is not None)
    first = s.get("max_window_layers", n)
    types = s.get("layer_types")
    if types is None and "sliding_window_pattern" in s:
        every = s.count("sliding_window_pattern")
        types = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]
    if types is None:
        types = [
            "sliding_attention" if used and size is not None and i >= first else "full_attention" for i in range(n)
        ]
    if len(types) != n or not set(types) <= {"full_attention", "sliding_attention"}:
        raise s.refusal("layer_types", f"it must say full_attention or sliding_attention for each of {n} layers")
    return [size if kind == "sliding_attention" else None for kind in types]


def dense(
    s: Settings,
    *,
    d_ff: int | None = None,
    activation_field: str = "hidden_act",
    activation: Any = None,
    gated: bool = True,
    bias: bool = False,
) -> Dense:
    """Reads a feed-forward part."""
    found = s.choice(activation_field, ACTIVATIONS, "silu")
    size = s.count("intermediate_size") if d_ff is None else d_ff
    return Dense(d_ff=size, activation=activation or found, gated=gated, bias=bias)  # ty: ignore[invalid-argument-type]


def experts(s: Settings, *, n_experts: str, width: str, renormalize: bool) -> MoE:
    """Reads routed experts, with a softmax over all of them and no bias for balance."""
    s.require("hidden_act", "silu", default="silu")
    return MoE(
        n_experts=s.count(n_experts),
        top_k=s.count("num_experts_per_tok"),
        d_expert=s.count(width),
        renormalize=renormalize,
        bias_rate=0.0,
    )


def model(
    s: Settings,
    layers: Sequence[BlockConfig],
    *,
    layers_field: str = "num_hidden_layers",
    width: str = "hidden_size",
    length: str = "max_position_embeddings",
    eps: str = "rms_norm_eps",
    norm: NormConfig | None = None,
    scaled_embedding: bool = False,
    tied_default: bool = False,
    **fields: Any,
) -> ModelConfig:
    """Reads the fields of a whole model; ``layers`` has its layers, or one block that all of them have."""
    n, d_model = s.count(layers_field), s.count(width)
    stack = list(layers) * n if len(layers) == 1 else list(layers)
    if scaled_embedding:
        fields["embedding_multiplier"] = math.sqrt(d_model)
    if norm is not None:
        fields["norm"] = norm
    return ModelConfig(
        vocab_size=s.count("vocab_size"),
        d_model=d_model,
        max_length=s.count(length),
        tied_embedding=s.flag("tie_word_embeddings", tied_default),
        norm_eps=float(s.number(eps, 1e-6)),
        **repeated(stack),
        **fields,
    )
