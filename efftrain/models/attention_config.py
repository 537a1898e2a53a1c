"""The configuration of grouped-query attention."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flax import nnx

from efftrain.config import LATER
from efftrain.errors import ConfigError
from efftrain.models.checks import one_of, positive
from efftrain.models.components import AttentionConfig, PositionConfig, ScoreModConfig
from efftrain.models.positions import Rotary

if TYPE_CHECKING:
    from efftrain.models.attention import SelfAttention
    from efftrain.models.config import ModelConfig

AttentionBackend = Literal["auto", "xla", "splash", "cudnn"]


@dataclass(frozen=True, kw_only=True)
class Attention(AttentionConfig):
    """Grouped-query attention.

    Attributes:
      n_heads: number of query heads.
      n_kv_heads: number of key and value heads; divides n_heads.
      d_head: size of a head; even for rotary positions.
      qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020), which is stable at high learning rates.
        "full": over the channels of all heads together, before they are split (OLMo 2).
      window: number of latest tokens that a token sees, itself included. None: all.
      rope_theta: base of the rotary frequencies.
      n_blocks: number of query blocks in training with the backend "xla", see ``ops.attention``.
      backend: the kernel in training, see ``ops.attention_backends``. "auto": chosen by the platform of the mesh.
      position: how queries and keys encode their positions.
      score_mod: modifies the attention scores; "auto" then selects the backend "xla". None: no modification.
      qkv_bias: queries, keys and values have a learned bias (Qwen2).
      out_bias: the output product has a learned bias (GPT-2).
      scale: factor of the products of queries and keys. None: ``d_head ** -0.5``.
      sinks: attention sinks, a learned logit of each query head that takes part in the softmax and starts at zero
        (gpt-oss), see ``ops.attention.causal_attention``; "auto" then selects the backend "xla".
    """

    quantizes_cache: ClassVar[bool] = True

    n_heads: int
    n_kv_heads: int
    d_head: int
    qk_norm: bool | Literal["full"] = False
    window: int | None = None
    rope_theta: float = 10_000.0
    n_blocks: int = 4
    backend: AttentionBackend = "auto"
    position: PositionConfig = dataclasses.field(default_factory=Rotary, metadata=LATER)
    score_mod: ScoreModConfig | None = dataclasses.field(default=None, metadata=LATER)
    qkv_bias: bool = dataclasses.field(default=False, metadata=LATER)
    out_bias: bool = dataclasses.field(default=False, metadata=LATER)
    scale: float | None = dataclasses.field(default=None, metadata=LATER)
    sinks: bool = dataclasses.field(default=False, metadata=LATER)

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "d_head", "n_blocks"):
            positive(f"attention.{name}", getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"attention.n_heads is {self.n_heads}, which attention.n_kv_heads {self.n_kv_heads} does not divide; "
                "make it a multiple"
            )
        if isinstance(self.position, Rotary):
            self.position.check(self.d_head)
        if self.window is not None:
            positive("attention.window", self.window)
        if self.qk_norm not in (False, True, "full"):
            raise ConfigError(f"attention.qk_norm is {self.qk_norm!r}; use False, True (per head) or 'full'")
        if self.scale is not None and not self.scale > 0:
            raise ConfigError(f"attention.scale is {self.scale}; give a positive number, or None for d_head ** -0.5")
        one_of("attention.backend", self.backend, AttentionBackend)
        if self.backend in ("auto", "xla"):
            return
        for name, part in (("score_mod", self.score_mod), ("sinks", self.sinks or None)):
            if part is not None:
                kind = part if part is True else type(part).__name__
                raise ConfigError(
                    f"attention.backend is {self.backend!r}, a kernel that cannot take attention.{name} ({kind}); use "
                    "'auto' or 'xla'"
                )

    def build(self, model: "ModelConfig", *, rngs: nnx.Rngs) -> "SelfAttention":
        from efftrain.models.attention import SelfAttention

        return SelfAttention(self, model, rngs=rngs)

    def empty_cache(self, model: "ModelConfig", batch: int, slots: int) -> Any:
        from efftrain.models.cache import empty_layer_cache

        return empty_layer_cache(self, model, batch, slots)

    def score_flops(self, keys: float) -> float:
        """FLOPs of the scores and the weighted values; positions and ``score_mod`` state their own."""
        return 4.0 * self.n_heads * self.d_head * keys
