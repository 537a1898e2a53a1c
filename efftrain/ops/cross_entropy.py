"""Cross entropy of a vocabulary head, in chunks of tokens: the logits of a whole batch never exist."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_ELEMENTS = 2**25  # logits that exist at once on a device: 128 MiB in float32


def cross_entropy(
    x_btd: Array,
    kernel_dv: Array,
    targets_bt: Array,
    weights_bt: Array,
    *,
    n_chunks: int | None = None,
    shards: int = 1,
) -> Array:
    """Weighted sum of the negative log likelihoods of the targets.

    The gradient is formed in the forward pass, chunk by chunk, so nothing is computed twice. A chunk takes every n-th
    token of each row, which leaves the sharding of batch and length as it is.

    Args:
      x_btd: (batch, length, d_model) hidden states, any float dtype.
      kernel_dv: (d_model, vocab) head in x's dtype.
      targets_bt: (batch, length) integers.
      weights_bt: (batch, length) float32 or bool; 0 leaves a token out.
      n_chunks: how many chunks, a divisor of the length. None: so that a chunk has at most ``CHUNK_ELEMENTS`` logits a
        shard.
      shards: over how many devices the tokens are divided, for that choice.

    Returns:
      () float32 nats, summed. Differentiable in x and the kernel.

    Source: the gradient in the forward pass follows Liger-Kernel (Hsu et al. 2024).
    """
    batch, length, _ = x_btd.shape
    if n_chunks is None:
        n_chunks = choose_chunks(length, batch * length * kernel_dv.shape[1] // shards)
    # int32: the targets are compared with 0 .. vocab - 1, which a smaller type may not hold.
    targets_bt = targets_bt.astype(jnp.int32)
    return _cross_entropy(x_btd, kernel_dv, targets_bt, weights_bt.astype(jnp.float32), n_chunks)


def choose_chunks(length: int, elements: int) -> int:
    """The smallest divisor of ``length`` that brings ``elements`` logits under ``CHUNK_ELEMENTS`` a chunk."""
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    return next((n for n in divisors if elements <= n * CHUNK_ELEMENTS), length)


def token_nll(logits: Array, targets: Array) -> Array:
    """Negative log likelihood of each target: logits (..., vocab), targets (...) -> (...) float32 nats."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(x_btd, kernel_dv, targets_bt, weights_bt, n_chunks):
    def add_chunk(total, chunk):
        x, targets, weights = chunk
        return total + (token_nll(_logits(x, kernel_dv), targets) * weights).sum(), None

    return over_chunks(add_chunk, jnp.zeros(()), (x_btd, targets_bt, weights_bt), n_chunks)[0]


def _forward(x_btd, kernel_dv, targets_bt, weights_bt, n_chunks):
    def add_chunk(carry, chunk):
        total, d_kernel = carry
        x, targets, weights = chunk
        logits = _logits(x, kernel_dv)
        log_z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        hit = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
        total += ((log_z[..., 0] - jnp.where(hit, logits, 0).sum(-1)) * weights).sum()
        d_logits = ((jnp.exp(logits - log_z) - hit) * weights[..., None]).astype(x.dtype)
        flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_logits.reshape(-1, d_logits.shape[-1])
        d_kernel += jax.lax.dot_general(flat_x, flat_d, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dx = (flat_d @ kernel_dv.T).reshape(x.shape)
        return (total, d_kernel), dx

    start = (jnp.zeros(()), jnp.zeros(kernel_dv.shape, jnp.float32))
    (total, d_kernel), dx_btd = over_chunks(add_chunk, start, (x_btd, targets_bt, weights_bt), n_chunks)
    return total, (dx_btd, d_kernel.astype(kernel_dv.dtype))


def _backward(n_chunks, gradients, cotangent):
    dx_btd, d_kernel = gradients
    return (
        (dx_btd * cotangent).astype(dx_btd.dtype),
        (d_kernel * cotangent).astype(d_kernel.dtype),
        None,
        None,
    )


_cross_entropy.defvjp(_forward, _backward)


def _logits(x: Array, kernel_dv: Array) -> Array:
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel_dv, preferred_element_type=jnp.float32)
    return flat.reshape(*x.shape[:-1], -1)


def over_chunks(step, carry, arrays, n_chunks):
    """``lax.scan`` of ``step`` over chunks of the length axis; outputs come back in the order of the length."""
    if n_chunks == 1:
        return step(carry, arrays)
    chunks = [jnp.moveaxis(a.reshape(a.shape[0], a.shape[1] // n_chunks, n_chunks, *a.shape[2:]), 2, 0) for a in arrays]
    carry, out = jax.lax.scan(step, carry, chunks)
    if out is not None:
        out = jnp.moveaxis(out, 0, 2)
        out = out.reshape(out.shape[0], -1, *out.shape[3:])
    return carry, out
