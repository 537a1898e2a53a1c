"""Attention by JAX's Pallas kernel for TPUs ("splash"): scores stay in blocks on the chip and never reach memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LANES = 128  # the kernel's smallest block along the row
LARGEST_BLOCK = 512  # fewer, larger blocks should keep the matrix unit busier; not measured
NOWHERE = np.iinfo(np.int32).min  # the segment of padding, which no token may have


def splash_attention(
    q_bthd: Array,
    k_bskd: Array,
    v_bskd: Array,
    *,
    segments_bs: Array | None = None,
    window: int | None = None,
    interpret: bool = False,
) -> Array:
    """Computes ``causal_attention``, forward and backward, without storing the scores.

    Rows are padded to multiples of 128: at their end, which causal queries never see, and in front of the keys, in a
    segment of their own. Blocks have 512, 256 or 128 tokens, the largest size that divides the padded row, so that
    lengths just below a multiple of 512 cost least.

    Args:
      q_bthd: (batch, t, heads, d_head), the last t of the s tokens.
      k_bskd: (batch, s, kv_heads, d_head); heads is a multiple of kv_heads.
      v_bskd: like k.
      segments_bs: (batch, s) int32. None: one segment per row.
      window: number of latest tokens that a token sees, itself included. None: all.
      interpret: run the kernel's Python code on any platform; slow, for tests.

    Returns:
      (batch, t, heads, d_head) in q's dtype; scores and sums are float32.

    Source: jax.experimental.pallas.ops.tpu.splash_attention (flash attention, Dao 2023, that skips masked blocks).
    """
    batch, t, heads, d_head = q_bthd.shape
    s = k_bskd.shape[1]
    front, end = (t - s) % LANES, -t % LANES
    if front:
        segments_bs = jnp.zeros((batch, s), jnp.int32) if segments_bs is None else segments_bs
        segments_bs = jnp.pad(segments_bs, ((0, 0), (front, 0)), constant_values=NOWHERE)
    q_bhtd = _pad(q_bthd * d_head**-0.5, 0, end).swapaxes(1, 2)
    k_bksd, v_bksd = (_pad(a, front, end).swapaxes(1, 2) for a in (k_bskd, v_bskd))
    kernel = _kernel(heads, t + end, front + s + end, window, interpret)
    if segments_bs is None:
        out_bhtd = jax.vmap(kernel)(q_bhtd, k_bksd, v_bksd)
    else:
        segments_bs = jnp.pad(segments_bs, ((0, 0), (0, end)))
        out_bhtd = jax.vmap(kernel)(q_bhtd, k_bksd, v_bksd, _segment_ids(segments_bs, t + end))
    return out_bhtd.swapaxes(1, 2)[:, :t].astype(q_bthd.dtype)


def _pad(a_bthd: Array, front: int, end: int) -> Array:
    return jnp.pad(a_bthd, ((0, 0), (front, end), (0, 0), (0, 0))) if front or end else a_bthd


def _segment_ids(segments_bs: Array, t: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(q=segments_bs[:, -t:], kv=segments_bs)


def _kernel(heads: int, t: int, s: int, window: int | None, interpret: bool):
    """Returns the kernel for padded lengths t <= s, both multiples of 128."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # here: a slow import that only TPUs need

    if window is None:
        mask = splash.CausalMask((t, s), offset=s - t)
    else:
        mask = splash.LocalMask((t, s), window_size=(window - 1, 0), offset=s - t)
    q, kv = _block(t), _block(s)
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=q,
            block_kv=kv,
            block_kv_compute=kv,
            block_q_dkv=q,
            block_kv_dkv=kv,
            block_kv_dkv_compute=kv,
            block_q_dq=q,
            block_kv_dq=kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _block(length: int) -> int:
    return next(n for n in (LARGEST_BLOCK, LARGEST_BLOCK // 2, LANES) if length % n == 0)
