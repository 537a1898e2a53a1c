"""Scalings of rotary frequencies, by which models were extended to longer texts than they were pretrained on."""

from dataclasses import dataclass
from typing import Any

from jax import Array

from efftrain.errors import ConfigError
from efftrain.ops.rope import (
    llama3_frequencies,
    long_rope_attention_factor,
    long_rope_frequencies,
    yarn_attention_factor,
    yarn_frequencies,
)


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Base class of the scalings of rotary frequencies; a fork derives its own from it."""

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        """Returns the scaled frequencies, and a factor of the rotated queries and keys.

        Args:
          frequencies_r: (r,) the original frequencies.
          theta: their base.
          max_length: ``max_length`` of the model.
        """
        raise NotImplementedError

    def check(self, n_pairs: int) -> None:
        """Raises ``ConfigError`` if the scaling does not fit ``n_pairs`` frequencies."""

    def check_length(self, max_length: int) -> None:
        """Raises ``ConfigError`` if the scaling cannot be used for texts of ``max_length`` tokens."""


@dataclass(frozen=True, kw_only=True)
class LinearScaling(RopeScaling):
    """Position interpolation: all frequencies are divided by ``factor``. Chen et al. 2023."""

    factor: float

    def __post_init__(self):
        _above_zero(self, "factor")

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        return frequencies_r / self.factor, 1.0


@dataclass(frozen=True, kw_only=True)
class DynamicScaling(RopeScaling):
    """Dynamic NTK scaling, for texts up to the original length, where it changes nothing.

    For a longer text, every frequency depends on the present length of the text. All cached keys would have to be
    rotated anew with each token, and a token would see its past differently in decoding and in training. Therefore a
    model with a larger ``max_length`` than ``original_length`` is an error.

    Attributes:
      factor: the factor of the original model, kept for export.
      original_length: length in tokens of the longest sequence that the frequencies are not scaled for.

    Source: Peng et al. 2023 (YaRN), appendix B.2.
    """

    factor: float
    original_length: int

    def __post_init__(self):
        _above_zero(self, "factor", "original_length")

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        return frequencies_r, 1.0

    def check_length(self, max_length: int) -> None:
        if max_length > self.original_length:
            raise ConfigError(
                f"model.max_length is {max_length}, and beyond {self.original_length} tokens the frequencies of "
                f"DynamicScaling depend on the length of each text; set model.max_length to {self.original_length}, or "
                "use another scaling"
            )


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling(RopeScaling):
    """The scaling of Llama 3.1 and later, see ``ops.rope.llama3_frequencies``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self):
        _above_zero(self, "factor", "original_length", "low_freq_factor")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"Llama3Scaling.high_freq_factor is {self.high_freq_factor}; make it larger than low_freq_factor "
                f"{self.low_freq_factor}"
            )

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        scaled_r = llama3_frequencies(
            frequencies_r,
            factor=self.factor,
            low_freq_factor=self.low_freq_factor,
            high_freq_factor=self.high_freq_factor,
            original_length=self.original_length,
        )
        return scaled_r, 1.0


@dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """YaRN, see ``ops.rope.yarn_frequencies``.

    Attributes:
      factor, original_length, beta_fast, beta_slow, truncate: see there.
      attention_factor: factor of queries and keys. None: from ``factor``, by the formula of the paper.
      mscale, mscale_all_dim: factors in that formula (DeepSeek); if both are given, the result is that for ``mscale``
        divided by that for ``mscale_all_dim``. None: the formula of the paper.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        _above_zero(self, "factor", "original_length", "beta_fast", "beta_slow")

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        scaled_r = yarn_frequencies(
            frequencies_r,
            theta=theta,
            factor=self.factor,
            original_length=self.original_length,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.truncate,
        )
        if self.attention_factor is not None:
            return scaled_r, self.attention_factor
        if self.mscale and self.mscale_all_dim:
            above, below = (yarn_attention_factor(self.factor, m) for m in (self.mscale, self.mscale_all_dim))
            return scaled_r, above / below
        return scaled_r, yarn_attention_factor(self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRope(RopeScaling):
    """LongRoPE: each frequency has a factor of its own, by the length that the model is used for.

    The choice depends on ``max_length`` of the model, and not on the length of each text, so that cached keys stay
    valid. For texts up to the original length, set ``max_length`` to at most ``original_length``.

    Attributes:
      short_factor: (d_rotated / 2,) factors if ``max_length`` is at most ``original_length``.
      long_factor: (d_rotated / 2,) factors otherwise.
      original_length: length in tokens of the longest sequence before the extension.
      attention_factor: factor of queries and keys, for short and long texts. None: from ``max_length`` divided by
        ``original_length``, by the formula of the paper.

    Source: Ding et al. 2024 (LongRoPE).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    attention_factor: float | None = None

    def __post_init__(self):
        _above_zero(self, "original_length")

    def scaled(self, frequencies_r: Array, theta: float, max_length: int) -> tuple[Array, float]:
        factors = self.long_factor if max_length > self.original_length else self.short_factor
        factor = self.attention_factor
        if factor is None:
            factor = long_rope_attention_factor(max_length / self.original_length, self.original_length)
        return long_rope_frequencies(frequencies_r, factors), factor

    def check(self, n_pairs: int) -> None:
        for name in ("short_factor", "long_factor"):
            if (n := len(getattr(self, name))) != n_pairs:
                raise ConfigError(
                    f"LongRope.{name} has {n} factors and a head has {n_pairs} frequencies; give one for each"
                )


def _above_zero(scaling: Any, *names: str) -> None:
    for name in names:
        if not (value := getattr(scaling, name)) > 0:
            raise ConfigError(f"{type(scaling).__name__}.{name} is {value}; give a positive number")
