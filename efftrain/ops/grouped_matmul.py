"""Products of rows with the matrix of the group that each row belongs to: the arithmetic of a mixture of experts.

Assignments (token, choice) are laid out as rows, group after group, and each row is multiplied with its group's matrix.
A layout says where every assignment stands; how the groups are bounded decides which product can be used:

  capacity   every group has the same number of rows; what does not fit is dropped
  padded     groups of any size, each padded to whole blocks of rows; nothing is dropped
  ragged     groups of any size without padding, for ``jax.lax.ragged_dot``

Rows are moved by gathers only, also in the backward pass: a scatter-add is slow on every platform.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Dispatch = Literal["capacity", "padded", "ragged"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Where assignments stand.

    Attributes:
      row_nk: (tokens, choices) int32 row of each assignment; ``rows`` for one that was dropped.
      assignment_r: (rows,) int32 which assignment (token * choices + choice) stands in a row; -1 for padding.
      sizes_e: (groups,) int32 assignments of each group, the dropped ones included.
      group_b: (blocks,) int32 the group of each block of rows; None for a ragged layout.
    """

    row_nk: Array
    assignment_r: Array
    sizes_e: Array
    group_b: Array | None

    @property
    def n_rows(self) -> int:
        return self.assignment_r.shape[0]


def layout(groups_nk: Array, n_groups: int, dispatch: Dispatch, *, capacity: int = 0, block: int = 64) -> Layout:
    """Lays out the assignments, those of a group in the order of the tokens.

    Args:
      groups_nk: (tokens, choices) int32 group of each assignment.
      n_groups: how many there are.
      dispatch: see above.
      capacity: rows of each group in a capacity layout.
      block: rows of a block in a padded layout.
    """
    flat = groups_nk.reshape(-1)
    n = flat.shape[0]
    # Stable: tokens keep their order, so that equal scores give equal layouts on every machine.
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes_e = jnp.bincount(flat, length=n_groups).astype(jnp.int32)
    starts_e = jnp.cumsum(sizes_e) - sizes_e
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    place = rank - starts_e[flat]  # among the assignments of its group
    group_b = None
    if dispatch == "capacity":
        n_rows = n_groups * capacity
        row = jnp.where(place < capacity, flat * capacity + place, n_rows)
        group_b = jnp.arange(n_groups, dtype=jnp.int32)
    elif dispatch == "padded":
        n_blocks = -(-n // block) + n_groups - 1  # enough for every way in which the sizes can fall
        n_rows = n_blocks * block
        blocks_e = -(-sizes_e // block)
        last_e = jnp.cumsum(blocks_e)
        row = (last_e - blocks_e)[flat] * block + place
        group_b = jnp.minimum(jnp.searchsorted(last_e, jnp.arange(n_blocks), side="right"), n_groups - 1)
    else:
        n_rows, row = n, rank
    assignment_r = jnp.full(n_rows, -1, jnp.int32)
    assignment_r = assignment_r.at[row].set(jnp.arange(n, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Layout(row.reshape(groups_nk.shape).astype(jnp.int32), assignment_r, sizes_e, group_b)


@jax.custom_vjp
def to_rows(x_nd: Array, where: Layout) -> Array:
    """(rows, d): each assignment's token in its row, zeros in the padding."""
    choices = where.row_nk.shape[1]
    rows = x_nd[jnp.maximum(where.assignment_r, 0) // choices]
    return jnp.where(where.assignment_r[:, None] >= 0, rows, 0)


def _to_rows_forward(x_nd: Array, where: Layout) -> tuple[Array, Layout]:
    return to_rows(x_nd, where), where


def _to_rows_backward(where: Layout, gradient_rd: Array) -> tuple[Array, None]:
    return _take_rows(gradient_rd, where).sum(1, dtype=jnp.float32).astype(gradient_rd.dtype), None


to_rows.defvjp(_to_rows_forward, _to_rows_backward)


@jax.custom_vjp
def from_rows(y_rd: Array, weights_nk: Array, where: Layout) -> Array:
    """(tokens, d) in float32: the sum of each token's rows, weighted; a dropped assignment adds nothing."""
    return jnp.einsum("nkd,nk->nd", _take_rows(y_rd, where), weights_nk, preferred_element_type=jnp.float32)


def _from_rows_forward(y_rd: Array, weights_nk: Array, where: Layout) -> tuple[Array, tuple]:
    return from_rows(y_rd, weights_nk, where), (y_rd, weights_nk, where)


def _from_rows_backward(saved: tuple, gradient_nd: Array) -> tuple[Array, Array, None]:
    y_rd, weights_nk, where = saved
    weights = jnp.einsum("nkd,nd->nk", _take_rows(y_rd, where), gradient_nd, preferred_element_type=jnp.float32)
    weight_r = weights_nk.reshape(-1)[jnp.maximum(where.assignment_r, 0)]
    rows = to_rows(gradient_nd, where) * weight_r[:, None]
    return rows.astype(y_rd.dtype), weights.astype(weights_nk.dtype), None


from_rows.defvjp(_from_rows_forward, _from_rows_backward)


def _take_rows(y_rd: Array, where: Layout) -> Array:
    """(tokens, choices, d), zeros for what was dropped."""
    rows = y_rd[jnp.minimum(where.row_nk, where.n_rows - 1)]
    return jnp.where((where.row_nk < where.n_rows)[..., None], rows, 0)


def grouped_matmul(x_rd: Array, w_edf: Array, where: Layout, dispatch: Dispatch) -> Array:
    """(rows, f): each row times the matrix of its group, sums in float32, in the dtype of x.

    Args:
      x_rd: rows as ``to_rows`` laid them out.
      w_edf: (groups, d, f) in the dtype of x.
    """
    if dispatch == "ragged":
        return jax.lax.ragged_dot(x_rd, w_edf, where.sizes_e, preferred_element_type=jnp.float32).astype(x_rd.dtype)
    if dispatch == "capacity":
        # One product a group and not one batched product: on CPU that one would use a single core.
        groups = jnp.split(x_rd, w_edf.shape[0])
        return jnp.concatenate([_dot(x_cd, w_df) for x_cd, w_df in zip(groups, w_edf, strict=True)])
    return _blocks_matmul(x_rd, w_edf, where.group_b)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


@jax.custom_vjp
def _blocks_matmul(x_rd: Array, w_edf: Array, group_b: Array) -> Array:
    x_bmd = x_rd.reshape(len(group_b), -1, x_rd.shape[-1])
    y_bmf = jax.lax.map(lambda block: _dot(block[0], w_edf[block[1]]), (x_bmd, group_b))
    return y_bmf.reshape(x_rd.shape[0], -1)


def _blocks_forward(x_rd: Array, w_edf: Array, group_b: Array) -> tuple[Array, tuple]:
    return _blocks_matmul(x_rd, w_edf, group_b), (x_rd, w_edf, group_b)


def _blocks_backward(saved: tuple, gradient_rf: Array) -> tuple[Array, Array, None]:
    x_rd, w_edf, group_b = saved
    n_blocks = len(group_b)
    gradient_bmf = gradient_rf.reshape(n_blocks, -1, gradient_rf.shape[-1])
    x_bmd = x_rd.reshape(n_blocks, -1, x_rd.shape[-1])

    def block(w_gradient_edf: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x_md, gradient_mf, group = inputs
        part = jnp.matmul(x_md.T, gradient_mf, preferred_element_type=jnp.float32)
        return w_gradient_edf.at[group].add(part), _dot(gradient_mf, w_edf[group].T)

    zeros = jnp.zeros(w_edf.shape, jnp.float32)
    w_gradient_edf, x_gradient_bmd = jax.lax.scan(block, zeros, (x_bmd, gradient_bmf, group_b))
    return x_gradient_bmd.reshape(x_rd.shape), w_gradient_edf.astype(w_edf.dtype), None


_blocks_matmul.defvjp(_blocks_forward, _blocks_backward)
