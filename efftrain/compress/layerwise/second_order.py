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
from efftrain.ops.masks import SemiStructured, Unstructured, keep_highest
from efftrain.ops.number_formats import Format
from efftrain.ops.quantize import QuantizedArray, group_size, quantize, step_of, stored_scale

BLOCK = 128  # rows, at most, whose making-up reaches the rows after them together
DAMPING = 0.01  # of the mean of the diagonal
MOST_DAMPING = 1e3


def inverse_factor(hessian_dd: Array, damping: float = DAMPING) -> tuple[Array, float]:
    """The upper Cholesky factor U of the inverse of a damped Hessian, ``inverse = U^T U``, float32.

    Args:
      hessian_dd: sum of ``x x^T``.
      damping: added to the diagonal, as a share of its mean. Where rounding leaves no positive matrix, it grows tenfold
        until there is one.

    Returns:
      U and the damping that was needed.

    Raises:
      ConfigError: the matrix is not finite.
    """
    hessian = np.asarray(hessian_dd)
    if not np.isfinite(hessian).all():
        raise ConfigError("the products of the calibration's inputs are not finite; calibrate a model that works")
    unused, mean = (np.diag(hessian) == 0).astype(hessian.dtype), np.mean(np.diag(hessian))
    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (hessian,))
    while damping <= MOST_DAMPING:
        # In place: of a wide layer this matrix is as large as the layer.
        matrix = np.array(hessian, order="F")
        matrix[np.diag_indices_from(matrix)] += unused + damping * mean  # an input that is always zero gets a one
        matrix, failed = potrf(matrix, overwrite_a=True)
        if not failed:
            matrix, failed = potri(matrix, overwrite_c=True)
        if not failed:
            matrix, failed = potrf(matrix, overwrite_a=True)
        if not failed and np.isfinite(matrix).all():
            return jnp.asarray(np.triu(matrix)), damping
        damping *= 10
    raise ConfigError("the products of the calibration's inputs cannot be inverted; give more calibration rows")


def damped(damping: float) -> str:
    """For a report: empty where the usual damping was enough."""
    return f"damped by {damping:g} of the mean square of its inputs" if damping > DAMPING else ""


def compensated(
    w_df: Array,
    factor_dd: Array,
    project: Callable[[Array, Array], Array],
    *,
    select: Callable[[Array, Array, Array], Array] | None = None,
    group: int | None = None,
) -> Array:
    """(d, f) float32 with every row replaced by what ``project`` makes of it, and the rows behind it made up for that.

    Args:
      w_df: float32.
      factor_dd: of ``inverse_factor``, its rows in the order of those of w.
      project: (row (f,), its number () int32) -> (f,): the nearest that is allowed. Traced.
      select: (rows (g, f) of a group, diagonal of the factor (g,), number of the first row) -> (g, f) bool: False where
        a number becomes zero. Decided when the first row is reached; the rows have by then made up for those before.
      group: rows; divides d. None: a block.

    Blocks have equally many rows, ``BLOCK`` at most (but for whole groups); rows of zeros fill up the last one.
    """
    d, f = w_df.shape
    size = -(-d // -(-d // BLOCK))
    size = -(-size // (group or 1)) * (group or 1)
    group, filling = group or size, -d % size
    if filling:
        w_df = jnp.pad(w_df, ((0, filling), (0, 0)))
        factor_dd = jax.scipy.linalg.block_diag(factor_dd, jnp.eye(filling, dtype=factor_dd.dtype))

    def block(w_df: Array, first: Array) -> tuple[Array, Array]:
        rows_bf = jax.lax.dynamic_slice_in_dim(w_df, first, size)
        own_bb = jax.lax.dynamic_slice(factor_dd, (first, first), (size, size))

        def row(i: Array, carry: tuple[Array, Array, Array], start: Array, keep_gf: Array | None):
            rows_bf, out_bf, error_bf = carry
            new_f = project(rows_bf[i], first + i)
            if keep_gf is not None:
                new_f = jnp.where(keep_gf[i - start], new_f, 0)
            error_f = (rows_bf[i] - new_f) / own_bb[i, i]
            # Upper triangular: rows before this one stay as they are.
            return rows_bf - own_bb[i][:, None] * error_f, out_bf.at[i].set(new_f), error_bf.at[i].set(error_f)

        def rows_of_group(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            start, keep_gf = j * group, None
            if select is not None:
                rows_gf = jax.lax.dynamic_slice_in_dim(carry[0], start, group)
                diagonal_g = jax.lax.dynamic_slice_in_dim(jnp.diag(own_bb), start, group)
                keep_gf = select(rows_gf, diagonal_g, first + start)
            return jax.lax.fori_loop(start, start + group, partial(row, start=start, keep_gf=keep_gf), carry)

        empty = jnp.zeros_like(rows_bf)
        _, out_bf, error_bf = jax.lax.fori_loop(0, size // group, rows_of_group, (rows_bf, empty, empty))
        to_all_bd = jax.lax.dynamic_slice_in_dim(factor_dd, first, size)
        return w_df - jnp.matmul(
            to_all_bd.T, error_bf, precision="highest"
        ), out_bf  # rows of this block are not read again

    return jax.lax.scan(block, w_df, jnp.arange(0, d, size))[1].reshape(-1, f)[:d]


def gptq(w_df: Array, hessian_dd: Array, format: Format) -> tuple[QuantizedArray, float]:
    """The matrix quantised so that its products with the calibration's inputs change least.

    Rows of large inputs come first; scales are those of the matrix as it was, so that groups stay where they are.

    Args:
      w_df: (d_in, d_out).
      hessian_dd: ``calibration.hessians`` of its inputs.
      format: of the result.

    Returns:
      The matrix, and the damping that ``inverse_factor`` needed.
    """
    order_d = jnp.argsort(-jnp.diag(hessian_dd))
    factor_dd, damping = inverse_factor(hessian_dd[jnp.ix_(order_d, order_d)])
    scale_gf = stored_scale(step_of(w_df, format), format)
    nearest_df = _gptq(w_df.astype(jnp.float32), factor_dd, scale_gf, order_d, format)
    return quantize(nearest_df, format, scale=scale_gf), damping


def sparse_gpt(
    w_df: Array, hessian_dd: Array, structure: Unstructured | SemiStructured, format: Format | None = None
) -> tuple[Array, float]:
    """The matrix with zeros so that its products with the calibration's inputs change least.

    In each block of rows the numbers go that cost least by the second derivative, ``w^2 / U_jj^2``; the rows after it
    make up for them.

    Args:
      w_df, hessian_dd: as of ``gptq``.
      structure: which numbers go.
      format: what stays is of this format too; its scales are those of the matrix as it was.

    Returns:
      The matrix, float32, and the damping that ``inverse_factor`` needed.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """
    live_d = jnp.diag(hessian_dd) > 0  # what reads an input that is always zero is of no use
    w_df = jnp.where(live_d[:, None], w_df.astype(jnp.float32), 0)
    scale_gf = None if format is None else stored_scale(step_of(w_df, format), format).astype(jnp.float32)
    factor_dd, damping = inverse_factor(hessian_dd)
    return _sparse_gpt(w_df, factor_dd, scale_gf, structure, format), damping


@partial(jax.jit, static_argnames=("structure", "format"))
def _sparse_gpt(
    w_df: Array,
    factor_dd: Array,
    scale_gf: Array | None,
    structure: Unstructured | SemiStructured,
    format: Format | None,
) -> Array:
    def project(row_f: Array, i: Array) -> Array:
        if format is None:
            return row_f
        scale_f = scale_gf[i // group_size(len(w_df), format)]
        return format.nearest(row_f / scale_f) * scale_f

    # Of every block, so that the whole has exactly its share.
    kept_before = np.round(np.arange(len(w_df) + 1) * w_df.shape[1] * (1 - structure.sparsity)).astype(np.int64)

    def select(rows_gf: Array, diagonal_g: Array, first: Array) -> Array:
        cost_gf = (rows_gf / diagonal_g[:, None]) ** 2
        if isinstance(structure, SemiStructured):
            return keep_highest(cost_gf.T, structure.n).T
        starts = np.arange(len(w_df))
        ends = np.minimum(starts + len(rows_gf), len(w_df))  # of rows that fill up the last block, none is kept
        n_keep = jnp.asarray(kept_before[ends] - kept_before[starts], jnp.int32)[first]
        return keep_highest(cost_gf.reshape(-1), n_keep).reshape(cost_gf.shape)

    group = structure.m if isinstance(structure, SemiStructured) else None
    return compensated(w_df, factor_dd, project, select=select, group=group)


@partial(jax.jit, static_argnames="format")
def _gptq(w_df: Array, factor_dd: Array, scale_gf: Array, order_d: Array, format: Format) -> Array:
    scale_gf, size = scale_gf.astype(jnp.float32), group_size(len(w_df), format)

    def project(row_f: Array, i: Array) -> Array:
        scale_f = scale_gf[order_d[i] // size]
        return jnp.where(w_df[order_d[i]] != 0, format.nearest(row_f / scale_f) * scale_f, 0)  # pruned stays pruned

    ordered_df = compensated(w_df[order_d], factor_dd, project)
    return jnp.zeros_like(w_df).at[order_d].set(ordered_df)
