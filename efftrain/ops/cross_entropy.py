"""Cross entropy of the next token."""

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.fused_linear_loss import VocabularyHead, as_head, choose_chunks, fused_linear_loss


def cross_entropy(
    x_btd: Array,
    head: VocabularyHead | Array,
    targets_bt: Array,
    weights_bt: Array,
    *,
    n_chunks: int | None = None,
    shards: int = 1,
) -> Array:
    """Weighted sum of the negative log likelihoods of the targets; see ``fused_linear_loss``.

    Args:
      x_btd: (batch, length, d_model) hidden states, any float dtype.
      head: see ``fused_linear_loss``.
      targets_bt: (batch, length) integers.
      weights_bt: (batch, length) float32 or bool; a token with weight 0 does not count.
      n_chunks: number of chunks, from 1 to the length. None: chosen so that a chunk has at most ``CHUNK_ELEMENTS``
        logits per shard.
      shards: number of devices over which the tokens are divided, for the choice of ``n_chunks``.

    Returns:
      () float32 nats, summed. Differentiable in x and the head.
    """
    batch, length, _ = x_btd.shape
    head = as_head(head)
    if n_chunks is None:
        n_chunks = choose_chunks(length, batch * length * head.kernel_dv.shape[1] // shards)
    # int32: the targets are compared with 0 .. vocab - 1, which may not fit into a smaller dtype.
    arrays = targets_bt.astype(jnp.int32), weights_bt.astype(jnp.float32)
    return fused_linear_loss(_weighted_nll, x_btd, head, arrays, n_chunks=n_chunks)[0]


def token_nll(logits: Array, targets: Array) -> Array:
    """Negative log likelihood of each target: logits (..., vocab), targets (...) -> (...) float32 nats."""
    logits = logits.astype(jnp.float32)
    return jax.nn.logsumexp(logits, axis=-1) - at_targets(logits, targets)


def at_targets(values: Array, targets: Array) -> Array:
    """Selects values at targets: (..., vocab), (...) -> (...). By comparison, since indexing has a scatter gradient."""
    vocab = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    return jnp.where(vocab == targets[..., None], values, 0).sum(-1)


def _weighted_nll(logits: Array, arrays: tuple[Array, ...], _) -> tuple[Array, tuple[()]]:
    targets, weights = arrays
    return (token_nll(logits, targets) * weights).sum(), ()
