"""A bound of the attention scores."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.components import ScoreModConfig

if TYPE_CHECKING:
    from efftrain.models.attention_config import Attention
    from efftrain.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class SoftCap(ScoreModConfig):
    """Bounds the attention scores smoothly: ``cap * tanh(scores / cap)``. Gemma Team 2024 (Gemma 2), section 2.

    Attributes:
      cap: the bound.
    """

    cap: float

    def __post_init__(self):
        if not self.cap > 0:
            raise ConfigError(f"score_mod.cap is {self.cap}; give a positive number, or no score_mod")

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> "SoftCapped":
        return SoftCapped(self.cap)

    def score_flops(self, keys: float) -> float:
        return 0.0


class SoftCapped(nnx.Module):
    """The module of ``SoftCap``."""

    def __init__(self, cap: float):
        self.cap = cap

    def __call__(self, scores_bhts: Array, heads_h: Array, queries_bt: Array, keys_bs: Array) -> Array:
        return self.cap * jnp.tanh(scores_bhts / self.cap)
