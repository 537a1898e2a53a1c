"""The parametrised operations of which every model is made: a dense product, an embedding table, norms."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.models.quantization import Matrix, product, read, read_rows
from efftrain.ops.norm import layer_norm, rms_norm

# Logical axes of tables and heads, whose matrices are not those of dense products inside of the model.
TABLE_AXES = frozenset({"vocab", "positions"})


def scaled(x: Array, factor: float) -> Array:
    """Returns ``x * factor`` in x's dtype; the factor itself is not rounded to it. A factor of 1 costs nothing."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


class Linear(nnx.Module):
    """The one dense product of every model: ``y_...f = x_...d @ kernel_df``, plus a bias if there is one.

    Args:
      d_in, d_out: sizes of the kernel.
      axes: logical axis names of the kernel.
      units: number of indivisible pieces along each axis (heads, not their columns), for sharding. None: the sizes.
      dtype: dtype of the product; the kernel is float32.
      gain: factor of the initial kernel (LeCun normal).
      bias: add a learned bias (d_out,), which starts at zero.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        dtype: str,
        units: tuple[int, int] | None = None,
        gain: float = 1.0,
        bias: bool = False,
    ):
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (d_in, d_out)) * gain
        self.kernel = Matrix(kernel, axes=axes, units=units or (d_in, d_out), contraction=-2)
        if bias:
            self.bias = nnx.Param(jnp.zeros((d_out,)), axes=axes[1:], units=(units or (d_in, d_out))[1:])
        self.has_bias, self.dtype = bias, dtype

    def __call__(self, x: Array) -> Array:
        flat = x.reshape(-1, x.shape[-1])  # 2-D: XLA's fast product on CPU, forward and backward
        y = product(flat.astype(self.dtype), self, "kernel").reshape(*x.shape[:-1], -1)
        return y + self.bias[...].astype(y.dtype) if self.has_bias else y

    def cast_kernel(self) -> Array:
        """Returns the kernel (d_in, d_out) as the product uses it."""
        return read(self, "kernel", self.dtype)


class Embedding(nnx.Module):
    """A table of vectors: integers (...) -> (..., d_model).

    Args:
      vocab_size: number of vectors.
      d_model: their size.
      dtype: dtype of what is looked up; the table is float32.
      axis: logical axis name of the vectors' indices.
    """

    def __init__(self, vocab_size: int, d_model: int, *, rngs: nnx.Rngs, dtype: str, axis: str = "vocab"):
        table = nnx.initializers.normal(0.02)(rngs.params(), (vocab_size, d_model))
        # Scales are shared along a vector, which is what a lookup reads and what the tied head multiplies with a state.
        self.table = Matrix(table, axes=(axis, "embed"), units=(vocab_size, d_model), contraction=-1)
        self.dtype = dtype

    def __call__(self, tokens: Array) -> Array:
        # Cast after the lookup: the gradient of a frequent token adds up in float32; in bfloat16 it would stop growing.
        return read_rows(self, "table", tokens).astype(self.dtype)

    def as_head(self) -> Array:
        """Returns the transpose (d_model, vocab), for a tied head."""
        return read(self, "table", self.dtype).T


class RMSNorm(nnx.Module):
    """Root mean square normalisation with a learned scale, see ``ops.norm``.

    Args:
      size: size of the normalised axis.
      eps: see ``ops.norm``.
      axis: logical axis name of the scale; "norm" for the hidden channels.
      units: number of indivisible pieces of the axis, for sharding. None: the size.
      zero_centered: multiply with ``1 + scale``, where the scale starts at zero.
    """

    def __init__(
        self, size: int, *, eps: float, axis: str = "norm", units: int | None = None, zero_centered: bool = False
    ):
        start = jnp.zeros((size,)) if zero_centered else jnp.ones((size,))
        self.scale = nnx.Param(start, axes=(axis,), units=(units or size,))
        self.eps, self.zero_centered = eps, zero_centered

    def __call__(self, x: Array) -> Array:
        scale = 1 + self.scale[...] if self.zero_centered else self.scale[...]
        return rms_norm(x, scale, self.eps)


class CentredNorm(nnx.Module):
    """Layer normalisation with a learned scale and possibly a bias, see ``ops.norm``; arguments as of ``RMSNorm``."""

    def __init__(self, size: int, *, eps: float, axis: str = "norm", units: int | None = None, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((size,)), axes=(axis,), units=(units or size,))
        if bias:
            self.bias = nnx.Param(jnp.zeros((size,)), axes=(axis,), units=(units or size,))
        self.eps, self.has_bias = eps, bias

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.scale[...], self.bias[...] if self.has_bias else None, self.eps)
