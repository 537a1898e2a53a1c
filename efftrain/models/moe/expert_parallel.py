"""Expert parallelism: every device groups its own tokens by expert, and sends rows to the devices of the experts.

There is one function for one device (``_on_one_device``), called within ``shard_map`` if there is a mesh. Over
the mesh axis that splits the experts, two all-to-alls carry rows there and back. Each device sends every other the same
number of rows, so that shapes are static (GShard, Lepikhin et al. 2020; ragged exchanges do not exist on CPU).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from efftrain.ops.grouped_matmul import Dispatch, dispatch_layout, grouped_swiglu
from efftrain.ops.grouped_rows import Layout, from_rows, group_layout, to_rows
from efftrain.sharding.rules import activation_axes, activation_spec

Weights = tuple[Array, Array, Array]


@dataclass(frozen=True, kw_only=True)
class ExpertRun:
    """How experts are computed.

    Attributes:
      n_experts: number of experts over all devices.
      dispatch: see ``ops.grouped_matmul``; if there are not more assignments than experts, "each" is used.
      capacity: function from the number of tokens to the number of rows of an expert, for "capacity".
      exchange_factor: number of rows from one device to another, relative to the mean. None: the largest possible one.
      saliency: sum gate times output norm for each expert, for pruning.
    """

    n_experts: int
    dispatch: Dispatch
    capacity: Callable[[int], int]
    exchange_factor: float | None
    saliency: bool

    def sent_rows(self, n_assignments: int, devices: int) -> int:
        """Number of rows that a device sends to each of ``devices`` devices, including itself."""
        if self.exchange_factor is None:
            return n_assignments
        return min(math.ceil(self.exchange_factor * n_assignments / devices), n_assignments)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experts:
    """Output of the experts of a layer.

    Attributes:
      y: (..., d_model) in the dtype of x.
      loads_e: (experts,) float32, number of assignments, including dropped ones.
      dropped: () float32, number of dropped assignments.
      saliency_e: (experts,) float32; zeros if it was not requested.
    """

    y: Array
    loads_e: Array
    dropped: Array
    saliency_e: Array


def experts_on_mesh(x_btd: Array, experts_btk: Array, gates_btk: Array, weights: Weights, run: ExpertRun) -> Experts:
    """Computes the experts of all tokens on a mesh that may split rows, tokens, experts and their hidden width.

    Args:
      x_btd: (batch, length, d_model).
      experts_btk: (batch, length, k) int32; ``n_experts`` for an assignment to no expert, as for padding.
      gates_btk: (batch, length, k) float32.
      weights: gate and up (experts, d_model, hidden) and down (experts, hidden, d_model), in the dtype of x.
      run: how the experts are computed.

    Raises:
      ConfigError: the mesh cannot split a dimension, see ``ShardingRules.resolve``.
    """
    tokens = activation_spec(x_btd.shape, "batch", "length", None)
    if tokens is None:
        return _on_one_device(x_btd, experts_btk, gates_btk, weights, run=run, experts=(), tensor=())
    experts, tensor = activation_axes("experts"), activation_axes("mlp")
    into = activation_spec(weights[0].shape, "experts", None, "mlp")
    out = activation_spec(weights[2].shape, "experts", "mlp", None)
    rows = (*activation_axes("batch"), *activation_axes("length")) or None
    # A device has some of the hidden columns, so that its outputs are parts of a sum over ``tensor``. They keep that
    # axis and are summed outside, where the compiler sums once in the forward pass and not at all in the backward pass.
    y = PartitionSpec(tensor or None, *tokens)
    parts = Experts(y, *(PartitionSpec(rows) for _ in range(3)))  # ty: ignore[invalid-argument-type]  # specs as leaves

    def on_one_device(*arrays) -> Experts:
        with jax.named_scope("experts"):
            found = _on_one_device(*arrays, run=run, experts=experts, tensor=tensor)
        return jax.tree.map(lambda a: a[None], found)

    found = jax.shard_map(
        on_one_device, in_specs=(tokens, tokens, tokens, (into, into, out)), out_specs=parts, check_vma=False
    )(x_btd, experts_btk, gates_btk, weights)
    return jax.tree.map(lambda a: a.sum(0), found)


def _on_one_device(
    x_btd: Array, experts_btk: Array, gates_btk: Array, weights: Weights, *, run: ExpertRun, experts, tensor
) -> Experts:
    x_nd, experts_nk, gates_nk = (a.reshape(-1, a.shape[-1]) for a in (x_btd, experts_btk, gates_btk))
    local = partial(_local_experts, weights=weights, run=run)
    if experts:
        y_rd, where, dropped = _exchange(x_nd, experts_nk, local, run, experts)
    else:
        y_rd, where, dropped = local(x_nd, experts_nk, n_tokens=len(x_nd))
    y_nd = from_rows(y_rd, gates_nk, where)
    loads_e = jnp.bincount(experts_nk.reshape(-1), length=run.n_experts).astype(jnp.float32)
    saliency_e = jnp.zeros(run.n_experts)
    if run.saliency:
        whole_rd = jax.lax.psum(y_rd.astype(jnp.float32), tensor) if tensor else y_rd
        saliency_e = _saliency(whole_rd, where, experts_nk, gates_nk, run.n_experts)
    return Experts(y_nd.astype(x_btd.dtype).reshape(x_btd.shape), loads_e, dropped, saliency_e)


def _local_experts(
    x_nd: Array, experts_nk: Array, *, weights: Weights, run: ExpertRun, n_tokens: int
) -> tuple[Array, Layout, Array]:
    """Returns the output rows of this device's experts, their layout, and the number of assignments without a row.

    Args:
      x_nd: (tokens, d_model).
      experts_nk: indices among this device's experts; the index after the last one means no expert.
      weights: of this device's experts.
      run: how the experts are computed.
      n_tokens: number of tokens from which the capacity of an expert is computed.
    """
    n_local = weights[0].shape[0]
    dispatch = "each" if experts_nk.size <= n_local else run.dispatch
    where = dispatch_layout(experts_nk, n_local, dispatch, capacity=run.capacity(n_tokens))
    y_rd = grouped_swiglu(to_rows(x_nd, where), *weights, where, dispatch)
    dropped = jnp.sum((experts_nk < n_local) & (where.row_nk >= where.n_rows), dtype=jnp.float32)
    return y_rd, where, dropped


def _exchange(x_nd: Array, experts_nk: Array, local, run: ExpertRun, axes) -> tuple[Array, Layout, Array]:
    """``_local_experts`` over the devices of ``axes``: rows go to the devices of their experts and come back."""
    devices = jax.lax.axis_size(axes)
    n_local = run.n_experts // devices
    rows = run.sent_rows(experts_nk.size, devices)

    def swap(a: Array) -> Array:
        return jax.lax.all_to_all(a, axes, split_axis=0, concat_axis=0, tiled=True)

    sent = group_layout(experts_nk // n_local, devices, capacity=rows)
    there_r = experts_nk.reshape(-1)[jnp.maximum(sent.assignment_r, 0)] % n_local
    there_r = jnp.where(sent.assignment_r >= 0, there_r, n_local)
    y_rd, where, dropped = local(swap(to_rows(x_nd, sent)), swap(there_r)[:, None], n_tokens=len(x_nd) * devices)
    back_rd = swap(from_rows(y_rd, jnp.ones(where.row_nk.shape), where).astype(x_nd.dtype))
    unsent = (experts_nk < run.n_experts) & (sent.row_nk >= sent.n_rows)
    return back_rd, sent, dropped + jnp.sum(unsent, dtype=jnp.float32)


def _saliency(y_rd: Array, where: Layout, experts_nk: Array, gates_nk: Array, n_experts: int) -> Array:
    """(experts,) sum of gate times norm of the expert's output over its assignments. REAP, Lasby et al. 2025."""
    assignment_r = jnp.maximum(where.assignment_r, 0)
    norm_r = jnp.linalg.norm(jax.lax.stop_gradient(y_rd).astype(jnp.float32), axis=-1)
    value_r = jnp.where(where.assignment_r >= 0, norm_r * gates_nk.reshape(-1)[assignment_r], 0)
    return jnp.zeros(n_experts).at[experts_nk.reshape(-1)[assignment_r]].add(jax.lax.stop_gradient(value_r))
