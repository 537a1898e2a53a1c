"""Attention by cuDNN's flash kernels, for NVIDIA GPUs; only tested by tests marked ``gpu``, which need such a GPU."""

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError

DTYPES = ("bfloat16", "float16")
AMPERE, HOPPER = (8, 0), (9, 0)  # compute capabilities


def cudnn_attention(
    q_bthd: Array, k_bskd: Array, v_bskd: Array, *, segments_bs: Array | None = None, window: int | None = None
) -> Array:
    """Computes ``causal_attention``, forward and backward, without storing the scores.

    JAX's wrapper takes no segment ids. Segments are passed as an explicit mask (batch, 1, t, s), which becomes an
    additive bias in q's dtype. This is correct, but takes quadratic memory (once for all heads), and no block below the
    diagonal is skipped. Without segments and with t = s the mask is cuDNN's own and takes no memory.

    Args:
      q_bthd: (batch, t, heads, d_head) bfloat16 or float16, the last t of the s tokens; d_head a multiple of 8, at most
        256 (128 before Hopper).
      k_bskd: (batch, s, kv_heads, d_head); heads is a multiple of kv_heads.
      v_bskd: like k.
      segments_bs: (batch, s) integers; t and s must then be even. None: one segment per row.
      window: number of latest tokens that a token sees, itself included. None: all.

    Returns:
      (batch, t, heads, d_head) in q's dtype.

    Raises:
      ConfigError: cuDNN does not support the dtype, the shape or the GPU.
    """
    t, s = q_bthd.shape[1], k_bskd.shape[1]
    masked = segments_bs is not None or t != s
    if reason := refusal(q_bthd.dtype, q_bthd.shape[-1], t, s, masked=masked, capability=attached_capability()):
        raise ConfigError(f"attention.backend 'cudnn' {reason}")
    if not masked:
        # The pair is (tokens before, tokens after) the token itself, which ``window`` counts.
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q_bthd, k_bskd, v_bskd, is_causal=True, local_window_size=local, implementation="cudnn"
        )
    mask = explicit_mask(t, s, segments_bs, window)
    # With t = s the mask is causal already, but is_causal lets cuDNN skip what is above its own diagonal, which starts
    # at the first key.
    return jax.nn.dot_product_attention(q_bthd, k_bskd, v_bskd, mask=mask, is_causal=t == s, implementation="cudnn")


def explicit_mask(t: int, s: int, segments_bs: Array | None, window: int | None) -> Array:
    """Returns (batch or 1, 1, t, s) bool: which of the s tokens each of the last t sees."""
    query, key = jnp.arange(s - t, s)[:, None], jnp.arange(s)
    mask = key <= query
    if window is not None:
        mask &= query - key < window
    if segments_bs is None:
        return mask[None, None]
    return (mask & (segments_bs[:, s - t :, None] == segments_bs[:, None]))[:, None]


def attached_capability() -> str | None:
    """Returns the compute capability of the attached GPU, such as "8.0" for an A100; None if there is no GPU."""
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError:
        return None
    return getattr(device, "compute_capability", None)


def refusal(
    dtype: jnp.dtype, d_head: int, t: int, s: int, *, masked: bool, capability: str | None = None
) -> str | None:
    """Returns the reason why cuDNN's kernels cannot be used, as the end of a sentence, or None if they can.

    Args:
      dtype: dtype of the queries.
      d_head: size of a head.
      t, s: numbers of queries and keys.
      masked: whether the mask is an array.
      capability: compute capability of the GPU, such as "8.0". None: not known, as when a program is only compiled.
    """
    version = tuple(map(int, capability.split("."))) if capability else HOPPER
    if version < AMPERE:
        return f"needs a GPU of compute capability 8.0 and this one has {capability}; use 'xla'"
    largest = 256 if version >= HOPPER else 128
    if jnp.dtype(dtype).name not in DTYPES:
        return f"takes {' or '.join(DTYPES)} and the model computes in {jnp.dtype(dtype).name}; set model.dtype"
    if d_head % 8 or d_head > largest:
        where = f" on a GPU of compute capability {capability}" if capability else ""
        return (
            f"takes heads of at most {largest} in multiples of 8{where} and attention.d_head is {d_head}; change it or "
            "use 'xla'"
        )
    if masked and (t % 2 or s % 2):
        return f"takes segments in rows of even length and the row has {s} tokens; add one or use 'xla'"
    return None
