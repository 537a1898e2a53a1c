"""The number formats of quantised storage, and their names.

One convention is used everywhere, that of qwix and compressed-tensors: symmetric, ``value = scale * q``, with a scale
such that the largest magnitude of a group is half a step above the greatest level (absmax / 7.5 for 4 bits, levels -8
to 7).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError

ScaleDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """How numbers are stored; see the subclasses.

    Attributes:
      group: number of consecutive numbers along the contraction that share a scale. None: all of them, so that there is
        one scale for each output.
      scale_dtype: dtype of the stored scales.
    """

    group: int | None = None
    scale_dtype: ScaleDtype = "bfloat16"

    dtype: ClassVar[str]  # dtype of a level before packing

    def __post_init__(self):
        if self.group is not None and self.group < 1:
            raise ConfigError(f"quantization: group is {self.group}; give a positive number such as 32, or None")
        if self.scale_dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"quantization: scale_dtype is {self.scale_dtype!r}; use 'float32' or 'bfloat16'")

    @property
    def storage_bits(self) -> int:
        """Bits of one stored number, without its share of the scale."""
        return 8

    @property
    def levels(self) -> tuple[float, float]:
        """The least and the greatest level."""
        raise NotImplementedError

    def step(self, x: Array, axis: int) -> Array:
        """Returns the scales of float32 numbers, reduced along ``axis``, before they are rounded or checked."""
        raise NotImplementedError

    def nearest(self, v: Array) -> Array:
        """Returns the level nearest to each of the float32 numbers ``value / scale``, as float32."""
        return jnp.clip(jnp.round(v), *self.levels)


@dataclass(frozen=True, kw_only=True)
class Integer(Format):
    """Signed integers of 8 or 4 bits; those of 4 bits are packed, two to a byte."""

    bits: int = 8
    dtype: ClassVar[str] = "int8"

    def __post_init__(self):
        super().__post_init__()
        if self.bits not in (4, 8):
            raise ConfigError(f"quantization: bits is {self.bits}; use 8 or 4, or the format Ternary")

    @property
    def storage_bits(self) -> int:
        return self.bits

    @property
    def levels(self) -> tuple[float, float]:
        return -(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1

    def step(self, x: Array, axis: int) -> Array:
        return _times(jnp.abs(x).max(axis), 1 / (self.levels[1] + 0.5))


@dataclass(frozen=True, kw_only=True)
class Ternary(Format):
    """-1, 0 and 1 times the mean magnitude; four to a byte. For research: Ma et al. 2024 (BitNet b1.58)."""

    dtype: ClassVar[str] = "int8"

    @property
    def storage_bits(self) -> int:
        return 2

    @property
    def levels(self) -> tuple[float, float]:
        return -1.0, 1.0

    def step(self, x: Array, axis: int) -> Array:
        return _times(jnp.abs(x).sum(axis), 1 / x.shape[axis])


@dataclass(frozen=True, kw_only=True)
class Float8(Format):
    """Floating point numbers of 8 bits, 4 of exponent and 3 of mantissa (e4m3fn, Micikevicius et al. 2022)."""

    dtype: ClassVar[str] = "float8_e4m3fn"

    @property
    def levels(self) -> tuple[float, float]:
        return -448.0, 448.0

    def step(self, x: Array, axis: int) -> Array:
        return _times(jnp.abs(x).max(axis), 1 / self.levels[1])

    def nearest(self, v: Array) -> Array:
        # Clipped first, because above its largest number the dtype has only NaN. The barrier: XLA may remove a
        # conversion there and back, and with it the rounding (GPUs allow excess precision by default).
        return jax.lax.optimization_barrier(jnp.clip(v, *self.levels).astype(self.dtype)).astype(jnp.float32)


AnyFormat = Integer | Ternary | Float8  # what a field of a configuration may hold


def parse_format(text: str) -> AnyFormat:
    """Parses the name of a format with an optional group: ``int8``, ``int4:g32``, ``ternary:g64``, ``fp8``.

    Raises:
      ConfigError: the text is not a number format.
    """
    name, _, rest = text.partition(":")
    formats: dict[str, AnyFormat] = {
        "int8": Integer(bits=8),
        "int4": Integer(bits=4),
        "ternary": Ternary(),
        "fp8": Float8(),
    }
    if name not in formats or (rest and not (rest[0] == "g" and rest[1:].isdigit())):
        raise ConfigError(
            f"{text!r} is not a number format; use one of {', '.join(formats)}, optionally with a group, such as "
            "int4:g32"
        )
    format = formats[name]
    return replace(format, group=int(rest[1:])) if rest else format


def format_name(format: Format) -> str:
    """Inverse of ``parse_format``; the dtype of the scales is not in the name."""
    name = {Ternary: "ternary", Float8: "fp8"}.get(type(format)) or f"int{format.storage_bits}"
    return name if format.group is None else f"{name}:g{format.group}"


def _times(x: Array, reciprocal: float) -> Array:
    """Not a division, because XLA turns one into this product within a larger program, but not on its own."""
    return x * jnp.float32(reciprocal)
