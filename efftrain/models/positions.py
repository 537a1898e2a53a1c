"""Rotary positions of queries and keys."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flax import nnx
from jax import Array

from efftrain.models.components import PositionConfig
from efftrain.ops.rope import apply_rope, rope_angles

if TYPE_CHECKING:
    from efftrain.models.config import Attention, ModelConfig


@dataclass(frozen=True, kw_only=True)
class Rotary(PositionConfig):
    """Rotary position embedding, with the frequencies of ``attention.rope_theta``. Su et al. 2021."""

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> "RotaryEmbedding":
        return RotaryEmbedding(attention.d_head, attention.rope_theta)

    def other_flops(self) -> float:
        return 0.0


class RotaryEmbedding(nnx.Module):
    """The module of ``Rotary``, see ``ops.rope``."""

    def __init__(self, d_head: int, theta: float):
        self.d_head, self.theta = d_head, theta

    def queries(self, x_bthd: Array, positions_bt: Array) -> Array:
        return apply_rope(x_bthd, *rope_angles(positions_bt, self.d_head, self.theta))

    keys = queries
