"""Causal attention with grouped heads, segments and windows, for training and for a cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.quantize import QuantizedArray

# (scores (batch, heads, t, s) float32, positions of queries (batch, t), positions of keys (batch, s)) -> scores
ScoreMod = Callable[[Array, Array, Array], Array]


def causal_attention(
    q_bthd: Array,
    k_bskd: Array,
    v_bskd: Array,
    *,
    segments_bs: Array | None = None,
    window: int | None = None,
    n_blocks: int = 4,
    score_mod: ScoreMod | None = None,
    positions_bs: Array | None = None,
    sinks_h: Array | None = None,
) -> Array:
    """Softmax attention of each token to itself and earlier tokens of its segment.

    The queries are those of the last t of the s tokens: of all tokens if t = s, or of the device's own part of the row
    if a mesh splits the row.

    Queries are cut into blocks, and each block is multiplied only with the keys that it can see. This skips most of the
    upper triangle, and on CPU the independent products keep all cores busy (one batched product uses one core).

    Args:
      q_bthd: (batch, t, heads, d_head).
      k_bskd: (batch, s, kv_heads, d_head), s >= t; heads is a multiple of kv_heads.
      v_bskd: like k.
      segments_bs: (batch, s) integers; tokens see only their own segment. None: one segment per row.
      window: number of latest tokens that a token sees, itself included. None: all.
      n_blocks: number of query blocks; any number, since the last block may be shorter. With 1, the lengths may be
        symbolic sizes of ``jax.export``.
      score_mod: changes scores before they are masked. None: no change.
      positions_bs: (batch, s) integers, which ``score_mod`` reads.
      sinks_h: (heads,) attention sinks: the softmax of each head has one more logit, whose value is zero, so that a
        token may attend to nothing. None: no sinks.

    Returns:
      (batch, t, heads, d_head) in q's dtype; scores and sums are float32.

    Raises:
      ValueError: there is a ``score_mod`` but no ``positions_bs``.

    Source of the sinks: OpenAI 2025 (gpt-oss model card), section 2.2.
    """
    mod = None
    if score_mod is not None:
        if positions_bs is None:
            raise ValueError("causal_attention has a score_mod but no positions_bs; pass the positions of the tokens")
        mod = score_mod, positions_bs
    length, before = q_bthd.shape[1], k_bskd.shape[1] - q_bthd.shape[1]
    q_bkgtd, k_bksd, v_bksd = _group(q_bthd, k_bskd.shape[2]), k_bskd.swapaxes(1, 2), v_bskd.swapaxes(1, 2)
    size = -(-length // min(n_blocks, length))
    outs = []
    for start in [0] if n_blocks == 1 else range(0, length, size):
        stop = min(start + size, length)
        low, high = before + start, before + stop  # indices of the queries among the keys
        first = max(0, low - window + 1) if window else 0
        query, key = jnp.arange(low, high)[:, None], jnp.arange(first, high)[None]
        mask = key <= query
        if window:
            mask &= query - key < window
        if segments_bs is not None:
            same = segments_bs[:, low:high, None] == segments_bs[:, None, first:high]
            mask = (mask & same)[:, None, None]
        block = q_bkgtd[:, :, :, start:stop], k_bksd[:, :, first:high], v_bksd[:, :, first:high]
        outs.append(_attend(*block, mask, mod and (mod[0], mod[1][:, low:high], mod[1][:, first:high]), sinks_h))
    return _ungroup(jnp.concatenate(outs, axis=3) if len(outs) > 1 else outs[0])


def cached_attention(
    q_bthd: Array,
    k_bksd: Array | QuantizedArray,
    v_bksd: Array | QuantizedArray,
    positions_bt: Array,
    *,
    window: int | None = None,
    score_mod: tuple[ScoreMod, Array, Array] | None = None,
    sinks_h: Array | None = None,
) -> Array:
    """Attention of a few new tokens to a cache in which slot i holds the token at position i.

    Args:
      q_bthd: (batch, new tokens, heads, d_head).
      k_bksd: (batch, kv_heads, slots, d_head); the slots of the new tokens are already written. If quantised, it has
        one scale for each slot and head.
      v_bksd: like k.
      positions_bt: (batch, new tokens) position of each query; later slots are not seen, whatever they hold.
      window: as in ``causal_attention``.
      score_mod: the function as in ``causal_attention``, and the positions of the queries (batch, new tokens) and of
        all slots (batch, slots). None: no change.
      sinks_h: as in ``causal_attention``.

    Returns:
      (batch, new tokens, heads, d_head).
    """
    slots = jnp.arange(k_bksd.shape[2])
    mask = slots <= positions_bt[..., None]
    if window:
        mask &= positions_bt[..., None] - slots < window
    q_bkgtd = _group(q_bthd, k_bksd.shape[1])
    return _ungroup(_attend(q_bkgtd, k_bksd, v_bksd, mask[:, None, None], score_mod, sinks_h))


def _group(q_bthd: Array, kv_heads: int) -> Array:
    batch, length, heads, d_head = q_bthd.shape
    return q_bthd.reshape(batch, length, kv_heads, heads // kv_heads, d_head).transpose(0, 2, 3, 1, 4)


def _ungroup(out_bkgtd: Array) -> Array:
    batch, kv_heads, group, length, d_head = out_bkgtd.shape
    return out_bkgtd.transpose(0, 3, 1, 2, 4).reshape(batch, length, kv_heads * group, d_head)


def _attend(
    q_bkgtd: Array,
    k_bksd: Array | QuantizedArray,
    v_bksd: Array | QuantizedArray,
    mask: Array,
    score_mod: tuple[ScoreMod, Array, Array] | None,
    sinks_h: Array | None,
) -> Array:
    scale = q_bkgtd.shape[-1] ** -0.5
    k_bksd, k_scale = _levels_and_scale(k_bksd, q_bkgtd.dtype)
    v_bksd, v_scale = _levels_and_scale(v_bksd, q_bkgtd.dtype)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q_bkgtd * scale, k_bksd, preferred_element_type=jnp.float32) * k_scale
    if score_mod is not None:
        change, positions_bt, positions_bs = score_mod
        batch, _, _, *ts = scores.shape
        scores = change(scores.reshape(batch, -1, *ts), positions_bt, positions_bs).reshape(scores.shape)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    if sinks_h is not None:
        sinks = sinks_h.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:-1], 1))], axis=-1)
    # jax.nn.softmax instead of exp and sum: its own derivative is cheaper than that of the parts.
    weights = jax.nn.softmax(scores, axis=-1)
    weights = (weights if sinks_h is None else weights[..., :-1]) * v_scale
    out = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v_bksd.dtype), v_bksd, preferred_element_type=jnp.float32)
    return out.astype(q_bkgtd.dtype)


def _levels_and_scale(a_bksd: Array | QuantizedArray, dtype: jnp.dtype) -> tuple[Array, Array | float]:
    """Returns levels, and scales (batch, kv_heads, 1, 1, slots) for scores or weights: cheaper than for vectors."""
    if not isinstance(a_bksd, QuantizedArray):
        return a_bksd, 1.0
    return a_bksd.levels().astype(dtype), a_bksd.scale[..., 0].astype(jnp.float32)[:, :, None, None]
