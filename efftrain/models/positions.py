"""Positions of queries and keys: rotary, or none."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flax import nnx
from jax import Array

from efftrain.config import LATER
from efftrain.errors import ConfigError
from efftrain.models.components import PositionConfig
from efftrain.models.rope_scaling import RopeScaling
from efftrain.ops.rope import apply_rope, rope_angles, rope_frequencies

if TYPE_CHECKING:
    from efftrain.models.attention_config import Attention
    from efftrain.models.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Rotary(PositionConfig):
    """Rotary position embedding, with the frequencies of ``attention.rope_theta``. Su et al. 2021.

    Attributes:
      fraction: share of the channels of a head that are rotated, the first ones (GPT-NeoX, Phi).
      scaling: how the frequencies were changed for longer texts. None: not at all.
    """

    fraction: float = field(default=1.0, metadata=LATER)
    scaling: RopeScaling | None = field(default=None, metadata=LATER)

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"position.fraction is {self.fraction}; give a share above 0 and at most 1")

    def check(self, d_head: int) -> None:
        """Raises ``ConfigError`` if heads of ``d_head`` channels cannot be rotated."""
        n_rotated = self._n_rotated(d_head)
        if n_rotated % 2 and self.fraction == 1:
            raise ConfigError(f"attention.d_head is {d_head}; rotary embedding needs an even number, use {d_head + 1}")
        if n_rotated % 2 or not n_rotated:
            raise ConfigError(
                f"position.fraction is {self.fraction}, which rotates {n_rotated} of the {d_head} channels of a head; "
                "choose it so that an even number is rotated"
            )
        if self.scaling is not None:
            self.scaling.check(n_rotated // 2)

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> "RotaryEmbedding":
        if self.scaling is not None:
            self.scaling.check_length(model.max_length)
        return RotaryEmbedding(self._n_rotated(attention.d_head), attention.rope_theta, self.scaling, model.max_length)

    def other_flops(self) -> float:
        return 0.0

    def _n_rotated(self, d_head: int) -> int:
        return int(self.fraction * d_head)


@dataclass(frozen=True, kw_only=True)
class NoPosition(PositionConfig):
    """Queries and keys without positions: for positions that are added to the embedding, or none (NoPE)."""

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> "Unpositioned":
        return Unpositioned()

    def other_flops(self) -> float:
        return 0.0


class RotaryEmbedding(nnx.Module):
    """The module of ``Rotary``, see ``ops.rope``."""

    def __init__(self, n_rotated: int, theta: float, scaling: RopeScaling | None, max_length: int):
        self.n_rotated, self.theta, self.scaling, self.max_length = n_rotated, theta, scaling, max_length

    def queries(self, x_bthd: Array, positions_bt: Array) -> Array:
        frequencies_r = rope_frequencies(self.n_rotated, self.theta)
        if self.scaling is None:
            return apply_rope(x_bthd, *rope_angles(positions_bt, frequencies_r))
        frequencies_r, factor = self.scaling.scaled(frequencies_r, self.theta, self.max_length)
        cos_btr, sin_btr = rope_angles(positions_bt, frequencies_r)
        return apply_rope(x_bthd, cos_btr * factor, sin_btr * factor)

    keys = queries


class Unpositioned(nnx.Module):
    """The module of ``NoPosition``."""

    def queries(self, x_bthd: Array, positions_bt: Array) -> Array:
        return x_bthd

    keys = queries
