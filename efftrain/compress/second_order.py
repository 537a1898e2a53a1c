"""Changing a matrix row by row, each time making up for it with the rows that follow: GPTQ and SparseGPT.

Source: Frantar et al. 2023 (GPTQ), algorithm 1; Frantar and Alistarh 2023 (SparseGPT). There a layer computes ``W x``
and columns are changed; here it computes ``x W``, so that rows are.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array

from efftrain.errors import ConfigError
from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import QuantizedArray, group_size, quantize, step_of, stored_scale

BLOCK = 128  # rows whose making-up reaches the rows behind them together
DAMPING = 0.01  # of the mean of the diagonal
MOST_DAMPING = 1e3


def inverse_factor(gram_dd: Array, damping: float = DAMPING) -> Array:
    """The upper Cholesky factor U of the inverse of a damped Gram matrix, ``inverse = U^T U``, float32.

    Where rounding leaves no positive matrix, the damping grows tenfold until there is one.

    Raises:
      ConfigError: the matrix is not finite.
    """
    gram = np.asarray(gram_dd)
    if not np.isfinite(gram).all():
        raise ConfigError("the products of the calibration's inputs are not finite; calibrate a model that works")
    unused, mean = (np.diag(gram) == 0).astype(gram.dtype), np.mean(np.diag(gram))
    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (gram,))
    while damping <= MOST_DAMPING:
        # In place: of a wide layer this matrix is as large as the layer.
        matrix = np.array(gram, order="F")
        matrix[np.diag_indices_from(matrix)] += unused + damping * mean  # an input that is always zero gets a one
        matrix, failed = potrf(matrix, overwrite_a=True)
        if not failed:
            matrix, failed = potri(matrix, overwrite_c=True)
        if not failed:
            matrix, failed = potrf(matrix, overwrite_a=True)
        if not failed and np.isfinite(matrix).all():
            return jnp.asarray(np.triu(matrix))
        damping *= 10
    raise ConfigError("the products of the calibration's inputs cannot be inverted; give more calibration rows")


def compensated(w_df: Array, factor_dd: Array, project: Callable[[Array, Array], Array]) -> Array:
    """(d, f) float32 with every row replaced by what ``project`` makes of it, and the rows behind it made up for that.

    Args:
      w_df: float32.
      factor_dd: of ``inverse_factor``, its rows in the order of those of w.
      project: (row (f,), its number () int32) -> (f,): the nearest that is allowed. Traced.
    """
    d, f = w_df.shape
    size = next(n for n in range(min(BLOCK, d), 0, -1) if d % n == 0)

    def block(w_df: Array, first: Array) -> tuple[Array, Array]:
        rows_bf = jax.lax.dynamic_slice_in_dim(w_df, first, size)
        own_bb = jax.lax.dynamic_slice(factor_dd, (first, first), (size, size))

        def row(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            rows_bf, out_bf, error_bf = carry
            new_f = project(rows_bf[i], first + i)
            error_f = (rows_bf[i] - new_f) / own_bb[i, i]
            # Upper triangular: rows before this one stay as they are.
            return rows_bf - own_bb[i][:, None] * error_f, out_bf.at[i].set(new_f), error_bf.at[i].set(error_f)

        empty = jnp.zeros_like(rows_bf)
        _, out_bf, error_bf = jax.lax.fori_loop(0, size, row, (rows_bf, empty, empty))
        to_all_bd = jax.lax.dynamic_slice_in_dim(factor_dd, first, size)
        return w_df - jnp.matmul(
            to_all_bd.T, error_bf, precision="highest"
        ), out_bf  # rows of this block are not read again

    return jax.lax.scan(block, w_df, jnp.arange(0, d, size))[1].reshape(d, f)


def gptq(w_df: Array, gram_dd: Array, format: Format) -> QuantizedArray:
    """The matrix quantised so that its products with the calibration's inputs change least.

    Rows of large inputs come first; scales are those of the matrix as it was, so that groups stay where they are.

    Args:
      w_df: (d_in, d_out).
      gram_dd: ``observe.grams`` of its inputs.
      format: of the result.
    """
    order_d = jnp.argsort(-jnp.diag(gram_dd))
    factor_dd = inverse_factor(gram_dd[jnp.ix_(order_d, order_d)])
    scale_gf = stored_scale(step_of(w_df, format), format)
    nearest_df = _gptq(w_df.astype(jnp.float32), factor_dd, scale_gf, order_d, format)
    return quantize(nearest_df, format, scale=scale_gf)


@partial(jax.jit, static_argnames="format")
def _gptq(w_df: Array, factor_dd: Array, scale_gf: Array, order_d: Array, format: Format) -> Array:
    scale_gf, size = scale_gf.astype(jnp.float32), group_size(len(w_df), format)

    def project(row_f: Array, i: Array) -> Array:
        scale_f = scale_gf[order_d[i] // size]
        return format.nearest(row_f / scale_f) * scale_f

    ordered_df = compensated(w_df[order_d], factor_dd, project)
    return jnp.zeros_like(w_df).at[order_d].set(ordered_df)
