"""Layouts of the assignments of tokens to groups as rows, group after group, and the way of tokens there and back.

An assignment is a pair (token, choice). There are three layouts:

  capacity   every group has the same number of rows; what does not fit is dropped
  sorted     groups of any size, one after the other; nothing is dropped
  unsorted   a row for each assignment, in their order; nothing is dropped

Rows are moved only by gathers, also in the backward pass, because a scatter-add is slow on every platform.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """The rows of assignments.

    Attributes:
      row_nk: (tokens, choices) int32, row of each assignment; ``n_rows`` for an assignment without a row.
      assignment_r: (rows,) int32, the assignment (token * choices + choice) in each row; -1 for an empty row.
      sizes_e: (groups,) int32, number of assignments of each group, including dropped ones.
      group_r: (rows,) int32, group of each row of an unsorted layout. None for other layouts.
    """

    row_nk: Array
    assignment_r: Array
    sizes_e: Array
    group_r: Array | None = None

    @property
    def n_rows(self) -> int:
        return self.assignment_r.shape[0]


def group_layout(groups_nk: Array, n_groups: int, *, capacity: int | None = None, slack: int = 0) -> Layout:
    """Returns the layout of assignments, with those of a group in the order of the tokens.

    Args:
      groups_nk: (tokens, choices) int32, group of each assignment; ``n_groups`` for an assignment to no group.
      n_groups: number of groups.
      capacity: number of rows of each group. None: sorted rows without such a bound.
      slack: number of empty rows after the sorted ones.
    """
    flat = groups_nk.reshape(-1)
    n = flat.shape[0]
    # Stable, so that tokens keep their order, and equal scores give equal layouts on every machine.
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes_e = jnp.bincount(flat, length=n_groups).astype(jnp.int32)
    rank = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32), unique_indices=True)
    if capacity is None:
        n_rows, row = n + slack, rank
    else:
        n_rows = n_groups * capacity
        place = rank - (jnp.cumsum(sizes_e) - sizes_e)[flat]  # index among the assignments of its group
        row = jnp.where(place < capacity, flat * capacity + place, n_rows)
    row = jnp.where(flat < n_groups, row, n_rows)
    assignment_r = jnp.full(n_rows, -1, jnp.int32)
    assignment_r = assignment_r.at[row].set(jnp.arange(n, dtype=jnp.int32), mode="drop", unique_indices=True)
    return Layout(row.reshape(groups_nk.shape).astype(jnp.int32), assignment_r, sizes_e)


def unsorted_layout(groups_nk: Array, n_groups: int) -> Layout:
    """Returns a layout with a row for each assignment, empty if it has no group; arguments as in ``group_layout``."""
    flat = groups_nk.reshape(-1)
    number, belongs = jnp.arange(flat.shape[0], dtype=jnp.int32), flat < n_groups
    return Layout(
        row_nk=jnp.where(belongs, number, flat.shape[0]).reshape(groups_nk.shape),
        assignment_r=jnp.where(belongs, number, -1),
        sizes_e=jnp.bincount(flat, length=n_groups).astype(jnp.int32),
        group_r=jnp.minimum(flat, n_groups - 1),
    )


@jax.custom_vjp
def to_rows(x_nd: Array, where: Layout) -> Array:
    """Gathers each assignment's token into its row: (rows, d), with zeros in empty rows."""
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
    """Weighted sum of each token's rows: (tokens, d) float32; an assignment without a row adds nothing."""
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
    """Gathers the row of each assignment: (tokens, choices, d), zeros for an assignment without a row."""
    rows = y_rd[jnp.minimum(where.row_nk, where.n_rows - 1)]
    return jnp.where((where.row_nk < where.n_rows)[..., None], rows, 0)
