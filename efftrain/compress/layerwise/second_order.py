"""GPTQ and SparseGPT: change a matrix row by row, and update the remaining rows to compensate for each change.

Source: Frantar et al. 2023 (GPTQ), algorithm 1; Frantar and Alistarh 2023 (SparseGPT). In the papers a layer computes
``W x`` and columns are changed; here it computes ``x W``, and rows are changed.
"""

from collections.abc import Callable
from dataclasses import dataclass
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

BLOCK = 128  # maximum number of rows whose errors are applied together to the rows after the block
DAMPING = 0.01  # share of the mean of the diagonal
MAX_DAMPING = 1e3


def inverse_factor(hessian_dd: Array, damping: float = DAMPING) -> tuple[Array, float]:
    """Upper Cholesky factor U of the inverse of a damped Hessian: ``inverse = U^T U``.

    Args:
      hessian_dd: sum of ``x x^T``, (d, d).
      damping: what is added to the diagonal, as a share of its mean. If the matrix is not positive definite after
        rounding, the damping is multiplied by ten until it is.

    Returns:
      U (d, d) float32, and the damping that was needed.

    Raises:
      ConfigError: the matrix is not finite, or cannot be inverted with the highest damping either.
    """
    hessian = np.asarray(hessian_dd)
    if not np.isfinite(hessian).all():
        raise ConfigError(
            "the products of the calibration's inputs are not finite; use a model with finite activations"
        )
    unused, mean = (np.diag(hessian) == 0).astype(hessian.dtype), np.mean(np.diag(hessian))
    potrf, potri = scipy.linalg.get_lapack_funcs(("potrf", "potri"), (hessian,))
    while damping <= MAX_DAMPING:
        # In place, because for a wide layer this matrix is as large as the layer.
        matrix = np.array(hessian, order="F")
        matrix[np.diag_indices_from(matrix)] += unused + damping * mean  # 1 for an input that is always zero
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
    """A remark for a report if more than the usual damping was needed; otherwise empty."""
    return f"damped by {damping:g} of the mean square of its inputs" if damping > DAMPING else ""


def compensated(
    w_df: Array,
    factor_dd: Array,
    project: Callable[[Array, Array], Array],
    *,
    select: Callable[[Array, Array, Array], Array] | None = None,
    group: int | None = None,
) -> Array:
    """Projects a matrix row by row onto allowed values, and updates the remaining rows to compensate for each error.

    The rows are processed in blocks of equal size, at most ``BLOCK`` rows unless a group needs more; the last block is
    padded with rows of zeros.

    Args:
      w_df: the matrix (d, f) float32.
      factor_dd: the factor of ``inverse_factor``, with its rows in the order of those of w.
      project: a traced function from a row (f,) and its index () int32 to the nearest allowed row (f,).
      select: a function from the rows of a group (g, f), the diagonal of the factor for them (g,) and the index of the
        first row to a mask (g, f) bool, False where a weight becomes zero. It is called when the first row of the group
        is reached, after the rows were updated for all errors before them. None: no weight is pruned.
      group: number of rows in a group; divides d. None: a group is a block.

    Returns:
      The projected matrix (d, f) float32.
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
            # The factor is upper triangular, so that rows before this one do not change.
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


@dataclass(frozen=True)
class FactoredHessian:
    """A Hessian factored for ``gptq``; matrices that read the same input share it.

    Attributes:
      order_d: the inputs, from the largest mean square to the smallest, in which rows are quantised.
      factor_dd: see ``inverse_factor``; its rows are in this order.
      damping: see ``inverse_factor``.
    """

    order_d: Array
    factor_dd: Array
    damping: float

    @staticmethod
    def of(hessian_dd: Array) -> "FactoredHessian":
        """Factors ``calibration.hessians`` of an input."""
        order_d = jnp.argsort(-jnp.diag(hessian_dd))
        return FactoredHessian(order_d, *inverse_factor(hessian_dd[jnp.ix_(order_d, order_d)]))


def gptq(w_df: Array, hessian: FactoredHessian, format: Format, step_gf: Array | None = None) -> QuantizedArray:
    """Quantises a matrix by GPTQ, so that its products with the calibration inputs change little.

    The rows of the largest inputs are quantised first. The scales are those of the matrix before the quantisation, so
    that its groups stay as they are.

    Args:
      w_df: the matrix (d_in, d_out).
      hessian: of its inputs.
      format: number format of the result.
      step_gf: the scales before rounding, such as those of ``clipping.clipped_step``. None: those of ``step_of``.
    """
    scale_gf = stored_scale(step_of(w_df, format) if step_gf is None else step_gf, format)
    nearest_df = _gptq(w_df.astype(jnp.float32), hessian.factor_dd, scale_gf, hessian.order_d, format)
    return quantize(nearest_df, format, scale=scale_gf)


def sparse_gpt(
    w_df: Array, hessian_dd: Array, structure: Unstructured | SemiStructured, format: Format | None = None
) -> tuple[Array, float]:
    """Prunes a matrix by SparseGPT, so that its products with the calibration inputs change little.

    In each block of rows, the weights with the lowest cost by the second derivative, ``w^2 / U_jj^2``, become zero; the
    rows after them are updated to compensate.

    Args:
      w_df: the matrix (d_in, d_out).
      hessian_dd: ``calibration.hessians`` of its inputs.
      structure: the pattern of zeros and the sparsity.
      format: number format to which the remaining weights are rounded in the same pass, with the scales of the matrix
        before the pruning. None: they stay float.

    Returns:
      The matrix (d_in, d_out) float32, and the damping that ``inverse_factor`` needed.

    Source: Frantar and Alistarh 2023 (SparseGPT), algorithm 1.
    """
    live_d = jnp.diag(hessian_dd) > 0  # weights of an input that is always zero have no effect
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
        assert scale_gf is not None  # given with the format
        scale_f = scale_gf[i // group_size(len(w_df), format)]
        return format.nearest(row_f / scale_f) * scale_f

    # Cumulative numbers of kept weights, so that rounding in the blocks adds up to exactly the sparsity of the matrix.
    kept_before = np.round(np.arange(len(w_df) + 1) * w_df.shape[1] * (1 - structure.sparsity)).astype(np.int64)

    def select(rows_gf: Array, diagonal_g: Array, first: Array) -> Array:
        cost_gf = (rows_gf / diagonal_g[:, None]) ** 2
        if isinstance(structure, SemiStructured):
            return keep_highest(cost_gf.T, structure.n).T
        starts = np.arange(len(w_df))
        ends = np.minimum(starts + len(rows_gf), len(w_df))  # nothing is kept of the rows that pad the last block
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
