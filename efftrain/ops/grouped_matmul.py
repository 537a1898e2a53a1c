"""SwiGLU of rows, each with the matrices of its group: the arithmetic of a mixture of experts.

How rows are arranged by group decides how the products are computed (``Dispatch``):

  each       every assignment in its own row, with a copy of its group's matrices: for fewer rows than groups, as when
             one token is decoded; nothing is dropped
  capacity   the same number of rows for every group: one batched product; what does not fit was dropped
  blocks     sorted rows, one block at a time, with a backward pass of its own; nothing is dropped
  megablox   sorted rows by JAX's Pallas kernel for TPUs; nothing is dropped
  ragged     sorted rows by ``jax.lax.ragged_dot``; nothing is dropped. Its programs contain the products of every row
             with every group, on CPU and, as compiled for v5e (libtpu 0.0.52), on TPU, where its kernel may skip them
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.grouped_megablox import megablox_matmul, row_tile
from efftrain.ops.grouped_rows import Layout, group_layout, unsorted_layout
from efftrain.ops.platform import platform

Dispatch = Literal["each", "capacity", "blocks", "megablox", "ragged"]
Blocks = tuple[int, ...]
Carry = TypeVar("Carry")

SMALLEST, LARGEST = 8, 64  # bounds of the size of the last block of a group


def block_sizes(n_assignments: int, n_groups: int) -> tuple[int, int]:
    """Returns the block sizes of "blocks": that of whole blocks, and that of the small ones for the rest of a group.

    On CPU, two sizes are faster than one size alone (tests/bench/moe.py times the whole step). Groups of few rows, as
    in decoding, get smaller blocks.
    """
    mean = n_assignments // n_groups
    rest = SMALLEST
    while rest < LARGEST and 4 * rest <= mean:
        rest *= 2
    return 4 * rest, rest


def dispatch_layout(groups_nk: Array, n_groups: int, dispatch: Dispatch, *, capacity: int) -> Layout:
    """Returns the rows that ``grouped_swiglu`` takes; ``capacity`` is only for that dispatch. See ``group_layout``."""
    if dispatch == "each":
        return unsorted_layout(groups_nk, n_groups)
    if dispatch == "capacity":
        return group_layout(groups_nk, n_groups, capacity=capacity)
    # The last block of the last group may extend beyond the group; the megablox kernel needs whole tiles.
    rest = block_sizes(groups_nk.size, n_groups)[-1]
    slack = {"blocks": rest, "megablox": -groups_nk.size % row_tile(groups_nk.size), "ragged": 0}
    return group_layout(groups_nk, n_groups, slack=slack[dispatch])


def grouped_swiglu(
    x_rd: Array, gate_edf: Array, up_edf: Array, down_efd: Array, where: Layout, dispatch: Dispatch
) -> Array:
    """SwiGLU ``down(silu(gate(x)) * up(x))`` of each row by its group: (rows, d) in the dtype of x, sums in float32.

    Args:
      x_rd: rows as ``to_rows`` arranges them for the layout.
      gate_edf, up_edf: (groups, d, f) in the dtype of x.
      down_efd: (groups, f, d).
      where: the layout that ``dispatch_layout`` returned.
      dispatch: see the module docstring. The results of rows without an assignment are undefined, and get no gradient.
    """
    if dispatch == "blocks":
        sizes = block_sizes(where.row_nk.size, gate_edf.shape[0])
        return _blocks_swiglu(sizes, x_rd, gate_edf, up_edf, down_efd, where.sizes_e)
    if dispatch in ("megablox", "ragged"):
        matmul = partial(megablox_matmul, interpret=platform() != "tpu") if dispatch == "megablox" else _ragged
        hidden_rf = jax.nn.silu(matmul(x_rd, gate_edf, where.sizes_e)) * matmul(x_rd, up_edf, where.sizes_e)
        return matmul(hidden_rf, down_efd, where.sizes_e)
    if dispatch == "each":
        gate_rdf, up_rdf, down_rfd = (w[where.group_r] for w in (gate_edf, up_edf, down_efd))
        x_r1d = x_rd[:, None]
        return _dot(jax.nn.silu(_dot(x_r1d, gate_rdf)) * _dot(x_r1d, up_rdf), down_rfd)[:, 0]
    n_groups, d, f = gate_edf.shape
    gate_up_edf = jnp.concatenate([gate_edf, up_edf], axis=-1)
    hidden_ecf = _swiglu(_dot(x_rd.reshape(n_groups, -1, d), gate_up_edf), f)
    return _dot(hidden_ecf, down_efd).reshape(-1, d)


def _ragged(x_rd: Array, w_edf: Array, sizes_e: Array) -> Array:
    return jax.lax.ragged_dot(x_rd, w_edf, sizes_e, preferred_element_type=jnp.float32).astype(x_rd.dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(a.dtype)


def _swiglu(gate_up: Array, f: int) -> Array:
    return jax.nn.silu(gate_up[..., :f]) * gate_up[..., f:]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks_swiglu(
    blocks: Blocks, x_rd: Array, gate_edf: Array, up_edf: Array, down_efd: Array, sizes_e: Array
) -> Array:
    return _blocks_forward(blocks, x_rd, gate_edf, up_edf, down_efd, sizes_e)[0]


def _blocks_forward(
    blocks: Blocks, x_rd: Array, gate_edf: Array, up_edf: Array, down_efd: Array, sizes_e: Array
) -> tuple[Array, tuple]:
    f = gate_edf.shape[-1]

    def group(carry: tuple[Array, Array], inputs: tuple) -> tuple[tuple[Array, Array], None]:
        gate_df, up_df, down_fd, start, size = inputs
        gate_up_df = jnp.concatenate([gate_df, up_df], axis=-1)  # one wide product is faster than two

        def block(at: Array, rows: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            gate_up_rf, y_rd = carry
            product = _dot(_rows(x_rd, at, rows), gate_up_df)
            y = _dot(_swiglu(product, f), down_fd)
            return _set_rows(gate_up_rf, product, at), _set_rows(y_rd, y, at)

        return _over_blocks(blocks, start, size, len(x_rd), block, carry), None

    empty = jnp.zeros((x_rd.shape[0], 2 * f), x_rd.dtype), jnp.zeros_like(x_rd)
    inputs = gate_edf, up_edf, down_efd, jnp.cumsum(sizes_e) - sizes_e, sizes_e
    (gate_up_rf, y_rd), _ = jax.lax.scan(group, empty, inputs)
    return y_rd, (x_rd, gate_up_rf, inputs)


def _blocks_backward(blocks: Blocks, saved: tuple, gradient_rd: Array) -> tuple[Array, Array, Array, Array, None]:
    x_rd, gate_up_rf, inputs = saved
    f = gate_up_rf.shape[-1] // 2

    def group(dx_rd: Array, inputs: tuple) -> tuple[Array, tuple[Array, Array, Array]]:
        gate_df, up_df, down_fd, start, size = inputs
        gate_up_df = jnp.concatenate([gate_df, up_df], axis=-1)

        def block(at: Array, rows: int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dx_rd, d_gate_up, d_down = carry
            gradient = _rows(gradient_rd, at, rows)
            if rows == blocks[-1]:  # may extend into the rows of the next group
                gradient = jnp.where((at + jnp.arange(rows) < start + size)[:, None], gradient, 0)
            hidden, pull_back = jax.vjp(lambda product: _swiglu(product, f), _rows(gate_up_rf, at, rows))
            (d_product,) = pull_back(_dot(gradient, down_fd.T))
            d_down += _outer(hidden, gradient)
            d_gate_up += _outer(_rows(x_rd, at, rows), d_product)
            return _set_rows(dx_rd, _dot(d_product, gate_up_df.T), at), d_gate_up, d_down

        zeros = jnp.zeros(gate_up_df.shape, jnp.float32), jnp.zeros(down_fd.shape, jnp.float32)
        dx_rd, d_gate_up, d_down = _over_blocks(blocks, start, size, len(x_rd), block, (dx_rd, *zeros))
        dtype = x_rd.dtype
        return dx_rd, (d_gate_up[:, :f].astype(dtype), d_gate_up[:, f:].astype(dtype), d_down.astype(dtype))

    dx_rd, d_weights = jax.lax.scan(group, jnp.zeros_like(x_rd), inputs)
    return dx_rd, *d_weights, None


_blocks_swiglu.defvjp(_blocks_forward, _blocks_backward)


def _over_blocks(
    blocks: Blocks, start: Array, size: Array, n_rows: int, block: Callable[[Array, int, Carry], Carry], carry: Carry
) -> Carry:
    """Calls ``block(first row, rows, carry)`` until all rows of a group are done, in order.

    Blocks larger than all ``n_rows`` are skipped. The last block may write beyond its group: the following groups
    overwrite these rows later, or nothing reads them.
    """
    end = start + size
    for rows in blocks:
        if rows > n_rows:
            continue
        last = rows == blocks[-1]
        count = -(-(end - start) // rows) if last else (end - start) // rows
        carry = jax.lax.fori_loop(
            0, count, lambda i, carry, start=start, rows=rows: block(start + i * rows, rows, carry), carry
        )
        start += count * rows
    return carry


def _rows(a: Array, at: Array, rows: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a, at, rows)


def _set_rows(a: Array, values: Array, at: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a, values, at, axis=0)


def _outer(a_rd: Array, b_rf: Array) -> Array:
    return jnp.matmul(a_rd.T, b_rf, preferred_element_type=jnp.float32)
