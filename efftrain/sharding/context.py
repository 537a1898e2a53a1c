"""Context parallelism: attention over rows whose tokens are split over devices, and kernels on each device's part.

Each device keeps its queries and fetches the keys and values before them, which are small with grouped heads. They come
in the order of the row and end with the device's own. So all devices run one program: the queries are always those of
the last tokens, and what would be before the row is in a segment that no query has. (The alternative, to rotate keys
and values in a ring and merge partial softmaxes, Liu et al. 2023, needs less memory but cannot use unchanged kernels.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from efftrain.sharding.rules import activation_axes, activation_spec, shard_count

BEFORE_THE_ROW = np.iinfo(np.int32).min  # a segment that no token has


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScoreInputs:
    """The inputs that an ``attend`` with modified scores or sinks reads beside queries, keys and values.

    Attributes:
      positions_bs: (batch, s) integers, positions of the keys; the queries are the last t of them.
      heads_h: (heads,) int32, indices of the query heads among all heads.
      state: a pytree of arrays, replicated on every device.
      sinks_h: (heads,) attention sinks. None: there are none.
    """

    positions_bs: Array
    heads_h: Array
    state: Any
    sinks_h: Array | None = None


def attend_on_mesh(
    attend: Callable[..., Array],
    q_bthd: Array,
    k_btkd: Array,
    v_btkd: Array,
    segments_bt: Array | None,
    *,
    window: int | None,
    per_device: bool,
    scores: ScoreInputs | None = None,
) -> Array:
    """Causal self-attention of whole rows on a mesh that may split rows, heads and tokens.

    Args:
      attend: (q_bthd, k_bskd, v_bskd, segments_bs=...) -> (batch, t, heads, d_head) on one device, where the queries
        are the last t of s tokens.
      q_bthd: (batch, length, heads, d_head).
      k_btkd: (batch, length, kv_heads, d_head).
      v_btkd: like k.
      segments_bt: (batch, length) integers. None: one segment per row.
      window: the window that ``attend`` applies; keys that no query of a device sees are not fetched.
      per_device: whether ``attend`` is a kernel that the compiler cannot divide, and must therefore be called on each
        device even if only rows and heads are split.
      scores: inputs for the whole row; ``attend`` gets a device's part of them as ``scores=...``. None: no such
        argument.

    Raises:
      ConfigError: the mesh cannot split a dimension, see ``ShardingRules.resolve``.
    """
    context = activation_axes("length")
    q_spec = activation_spec(q_bthd.shape, "batch", "length", "heads", None)
    if q_spec is None or not (context or per_device):
        return _call(attend, q_bthd, k_btkd, v_btkd, segments_bt, scores)
    k_btkd, v_btkd = (_one_for_each_shard(a) for a in (k_btkd, v_btkd))
    k_spec = activation_spec(k_btkd.shape, "batch", "length", "heads", None)
    if context and segments_bt is None:
        segments_bt = jnp.zeros(q_bthd.shape[:2], jnp.int32)
    rows = _over_all_axes(activation_spec(q_bthd.shape[:2], "batch", "length"))
    specs: list[Any] = [_over_all_axes(q_spec), _over_all_axes(k_spec), _over_all_axes(k_spec), rows, None]
    if segments_bt is not None:
        segments_bt = segments_bt.astype(jnp.int32)
    if scores is not None:
        heads = activation_spec(scores.heads_h.shape, "heads")
        specs[-1] = ScoreInputs(rows, heads, PartitionSpec(), heads)  # ty: ignore[invalid-argument-type]  # specs as leaves

    def on_one_device(q: Array, k: Array, v: Array, segments: Array | None, scores: ScoreInputs | None) -> Array:
        if context:
            with jax.named_scope("context"):
                assert segments is not None  # given above if the row is split
                fetch = partial(fetch_earlier, axes=context, window=window)
                if scores is None:
                    k, v, segments = fetch(k, v, segments)
                else:
                    k, v, segments, positions_bs = fetch(k, v, segments, scores.positions_bs)
                    scores = replace(scores, positions_bs=positions_bs)
        return _call(attend, q, k, v, segments, scores)

    # check_vma is off, because kernels do not say how their results vary over the mesh.
    return jax.shard_map(on_one_device, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(
        q_bthd, k_btkd, v_btkd, segments_bt, scores
    )


def _call(attend: Callable[..., Array], q, k, v, segments: Array | None, scores: ScoreInputs | None) -> Array:
    return attend(q, k, v, segments_bs=segments, **({} if scores is None else {"scores": scores}))


def fetch_earlier(
    k_btkd: Array, v_btkd: Array, segments_bt: Array, *others: Array, axes: tuple[str, ...], window: int | None
) -> tuple[Array, ...]:
    """Fetches keys, values and segments of the tokens before a device's own, inside ``shard_map``.

    Args:
      k_btkd, v_btkd, segments_bt: of the device's own tokens.
      others: (batch, length, ...) of these tokens, to be fetched too.
      axes: mesh axes that split the row.
      window: number of latest tokens that a token sees, itself included. None: all.

    Returns:
      (batch, s, ...) of each argument: the earlier tokens, then the device's own. s is the same on all devices: the
      length of the row, or what the window reaches. What would be before the row has the segment ``BEFORE_THE_ROW``.
    """
    n, length = jax.lax.axis_size(axes), k_btkd.shape[1]
    index = jax.lax.axis_index(axes)
    hops = n - 1 if window is None else min(n - 1, -(-(window - 1) // length))
    chunk = index + jnp.arange(-hops, 1)  # the parts of the row, in order; a negative number is before the row

    def fetch(a: Array) -> Array:
        if hops == n - 1:  # the whole row: one collective, which uses both directions of the ring
            return jnp.take(jax.lax.all_gather(a, axes), chunk % n, axis=0)
        parts = [a]
        for _ in range(hops):
            parts.append(jax.lax.ppermute(parts[-1], axes, [(i, i + 1) for i in range(n - 1)]))
        return jnp.stack(parts[::-1])

    def join(parts: Array) -> Array:
        return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1, *parts.shape[3:])

    segments = jnp.where(chunk[:, None, None] < 0, BEFORE_THE_ROW, fetch(segments_bt))
    return join(fetch(k_btkd)), join(fetch(v_btkd)), join(segments), *(join(fetch(a)) for a in others)


def _over_all_axes(spec: PartitionSpec | None) -> PartitionSpec:
    """Adds the mesh axes of size 1 to the first dimension, because gradients are summed over axes that a spec lacks."""
    single = [axis for axis, size in jax.sharding.get_abstract_mesh().shape.items() if size == 1]
    first, *rest = spec or (None,)
    named = [first] if isinstance(first, str) else list(first or ())
    return PartitionSpec((*named, *single), *rest)


def _one_for_each_shard(a_btkd: Array) -> Array:
    """Repeats key and value heads if there are fewer of them than the mesh splits the query heads into.

    If ``kv_heads`` is kept whole, each device has all of them and nothing is copied.
    """
    kv_heads = a_btkd.shape[2]
    shards = shard_count("heads")
    return jnp.repeat(a_btkd, math.lcm(kv_heads, shards) // kv_heads, axis=2) if kv_heads % shards else a_btkd
