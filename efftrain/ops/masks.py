"""Sparsity masks: which numbers of a matrix are kept, an exact number of them in a pattern; and masks as bits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.multihost_utils import process_allgather

from efftrain.errors import ConfigError
from efftrain.moved import old_names
from efftrain.ops.counts import as_count

__getattr__ = old_names(__name__)


def keep_highest(scores: Array, n_keep: Array | int) -> Array:
    """Marks the ``n_keep`` highest numbers of the last axis: (..., n) bool; of equal numbers, the first are kept.

    Args:
      scores: (..., n) float.
      n_keep: () integer, may be traced. Exactly this number is kept.
    """
    n = scores.shape[-1]
    # One sort of values instead of permutations, for which there is no memory with a large matrix.
    ordered = jnp.sort(scores, axis=-1)
    least = jnp.take(ordered, jnp.clip(n - n_keep, 0, n - 1), axis=-1)[..., None]
    above = scores > least
    n_level = n_keep - above.sum(-1, keepdims=True)
    level = scores == least
    return above | (level & (jnp.cumsum(level, -1) <= n_level))


@dataclass(frozen=True, kw_only=True)
class Unstructured:
    """Unstructured sparsity: any numbers of a matrix may be removed.

    Attributes:
      sparsity: share of the numbers that is removed.
    """

    sparsity: float = 0.5

    def __post_init__(self):
        _check_sparsity(self.sparsity)

    def check(self, name: str, d: int, f: int) -> None:
        """Raises ``ConfigError`` if a (d, f) matrix cannot have the pattern."""
        if d * f >= 1 << 31:
            raise ConfigError(f"sparsity of {name}: {d} x {f} weights are too many for one ranking; use n:m or blocks")

    def group(self, a_ldf: Array) -> Array:
        """Groups the units of matrices: (l, d, f) -> (l, groups, units); the same number of each group is kept."""
        return a_ldf.reshape(len(a_ldf), 1, -1)

    def ungroup(self, keep_lgu: Array, shape: tuple[int, int, int]) -> Array:
        """Returns the mask (l, d, f) of kept units (l, groups, units); inverse of ``group``."""
        return keep_lgu.reshape(shape)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block sparsity: whole blocks of rows x columns (inputs x outputs) are removed; the score of a block is its mean.

    Attributes:
      sparsity: share of the blocks that is removed.
      rows: number of inputs of a block.
      columns: number of outputs of a block.
    """

    sparsity: float = 0.5
    rows: int = 4
    columns: int = 4

    def __post_init__(self):
        _check_sparsity(self.sparsity)
        if self.rows < 1 or self.columns < 1:
            raise ConfigError(f"blocks are {self.rows} x {self.columns}; give at least 1 row and 1 column")

    def check(self, name: str, d: int, f: int) -> None:
        if d % self.rows or f % self.columns:
            raise ConfigError(
                f"sparsity of {name}: blocks of {self.rows} x {self.columns} do not divide its {d} x {f}; choose others"
            )

    def group(self, a_ldf: Array) -> Array:
        n, d, f = a_ldf.shape
        blocks = a_ldf.reshape(n, d // self.rows, self.rows, f // self.columns, self.columns)
        return blocks.mean((2, 4), dtype=jnp.float32).reshape(n, 1, -1)

    def ungroup(self, keep_lgu: Array, shape: tuple[int, int, int]) -> Array:
        n, d, f = shape
        blocks = keep_lgu.reshape(n, d // self.rows, f // self.columns)
        return jnp.repeat(jnp.repeat(blocks, self.rows, 1), self.columns, 2)


@dataclass(frozen=True, kw_only=True)
class SemiStructured:
    """N:M sparsity: of ``m`` consecutive inputs ``n`` are kept for each output. NVIDIA's sparse tensor cores use 2:4.

    Attributes:
      n: number of kept inputs.
      m: number of consecutive inputs.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self):
        if not 0 < self.n <= self.m:
            raise ConfigError(f"sparsity {self.n}:{self.m} keeps {self.n} of {self.m}; give 0 < n <= m, such as 2:4")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def check(self, name: str, d: int, f: int) -> None:
        if d % self.m:
            raise ConfigError(
                f"sparsity of {name}: groups of {self.m} do not divide its {d} inputs; choose another m for "
                f"{self.n}:{self.m}"
            )

    def group(self, a_ldf: Array) -> Array:
        n, d, f = a_ldf.shape
        return a_ldf.reshape(n, d // self.m, self.m, f).swapaxes(2, 3).reshape(n, -1, self.m)

    def ungroup(self, keep_lgu: Array, shape: tuple[int, int, int]) -> Array:
        n, d, f = shape
        return keep_lgu.reshape(n, d // self.m, f, self.m).swapaxes(2, 3).reshape(shape)


Structure = Unstructured | Blocks | SemiStructured


def kept_units(structure: Structure, units: int, fraction: Array | float = 1.0, sparsity: float | None = None) -> Array:
    """Returns () int32: the number of units of a group that are kept.

    Args:
      structure: its sparsity is the target.
      units: number of units of a group.
      fraction: fraction of the way from 0 to the target sparsity; may be traced.
      sparsity: target in place of that of the structure. None: that of the structure.
    """
    sparsity = structure.sparsity if sparsity is None else sparsity
    # float32 cannot represent the number of units of a large matrix, so the target itself is computed in Python.
    on_the_way = jnp.round((1 - sparsity * fraction) * units).astype(jnp.int32)
    return jnp.where(jnp.asarray(fraction) >= 1, jnp.int32(round((1 - sparsity) * units)), on_the_way)


def kept_units_together(structure: Structure, units: int, fraction: Array | float) -> Array:
    """As ``kept_units``, for all matrices together: a count of ``ops.counts``, of up to 2^53 units."""
    on_the_way = jnp.round((1 - structure.sparsity * fraction) * float(units))
    exact = as_count(round((1 - structure.sparsity) * units))
    return jnp.where(jnp.asarray(fraction) >= 1, exact, as_count(on_the_way))


def count_zeros(a: Array) -> int:
    """Counts the exact zeros of an array (..., n), which may have more numbers than an int32 can count.

    If several processes hold the array, all of them must call it.
    """
    rows = zeros_per_row(a)
    if not rows.is_fully_addressable:
        rows = process_allgather(rows, tiled=True)
    return int(np.asarray(rows).sum(dtype=np.int64))


@jax.jit
def zeros_per_row(a: Array) -> Array:
    """Counts the exact zeros along the last axis: (..., n) -> (...) int32."""
    return (a == 0).sum(-1, dtype=jnp.int32)


def pack_bits(mask: Array, axis: int) -> Array:
    """Packs eight bools along the axis into each uint8; the last byte is filled up with zeros."""
    return jnp.packbits(mask, axis=axis)


def unpack_bits(packed: Array, size: int, axis: int) -> Array:
    """Inverse of ``pack_bits``: bool, with ``size`` entries along the axis."""
    return jnp.unpackbits(packed, axis=axis, count=size).astype(bool)


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ConfigError(
            f"sparsity is {sparsity}; it is the share of weights to remove, give a number from 0 to below 1"
        )
