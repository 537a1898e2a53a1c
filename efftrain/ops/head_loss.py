"""A loss on the logits of a vocabulary head, in chunks of tokens: the logits of a whole batch never exist."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_ELEMENTS = 2**25  # logits that exist at once on a device: 128 MiB in float32

# (logits (batch, some, vocab) float32, the arrays' part for these tokens, constants) -> (sum, other sums)
LogitsLoss = Callable[[Array, tuple[Array, ...], Any], tuple[Array, Any]]


def head_loss(
    loss_of: LogitsLoss,
    x_btd: Array,
    kernel_dv: Array,
    arrays: tuple[Array, ...],
    constants: Any = (),
    *,
    n_chunks: int,
) -> tuple[Array, Any]:
    """The sum over tokens of a loss on ``x @ kernel``, and sums of other figures.

    The gradient is formed in the forward pass, chunk by chunk, so nothing is computed twice. A chunk takes every n-th
    token of each row, which leaves the sharding of batch and length as it is.

    Args:
      loss_of: hashable; what it minimises is () float32, the other sums a pytree of () float32.
      x_btd: (batch, length, d_model) hidden states, any float dtype.
      kernel_dv: (d_model, vocab) head in x's dtype.
      arrays: (batch, length, ...) each; not differentiated.
      constants: a pytree that all chunks see, such as the head of a teacher; not differentiated.
      n_chunks: how many, a divisor of the length; see ``choose_chunks``.

    Returns:
      () float32 and the other sums. Differentiable in x and the kernel; the other sums are not.

    Source: the gradient in the forward pass follows Liger-Kernel (Hsu et al. 2024).
    """
    return _head_loss(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants)


def choose_chunks(length: int, elements: int) -> int:
    """The smallest divisor of ``length`` that brings ``elements`` logits under ``CHUNK_ELEMENTS`` a chunk."""
    divisors = [n for n in range(1, length + 1) if length % n == 0]
    return next((n for n in divisors if elements <= n * CHUNK_ELEMENTS), length)


def logits_of(x: Array, kernel_dv: Array) -> Array:
    """(..., d_model) @ (d_model, vocab) -> (..., vocab) float32."""
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel_dv, preferred_element_type=jnp.float32)
    return flat.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _head_loss(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants):
    def add_chunk(sums, chunk):
        x, *parts = chunk
        return jax.tree.map(jnp.add, sums, loss_of(logits_of(x, kernel_dv), tuple(parts), constants)), None

    zeros = _zeros(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants)
    return over_chunks(add_chunk, zeros, (x_btd, *arrays), n_chunks)[0]


def _forward(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants):
    def add_chunk(carry, chunk):
        sums, d_kernel = carry
        x, *parts = chunk
        total, pull, more = jax.vjp(
            lambda logits: loss_of(logits, tuple(parts), constants), logits_of(x, kernel_dv), has_aux=True
        )
        d_logits = pull(jnp.ones_like(total))[0].astype(x.dtype)
        flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_logits.reshape(-1, d_logits.shape[-1])
        d_kernel += jax.lax.dot_general(flat_x, flat_d, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        dx = (flat_d @ kernel_dv.T).reshape(x.shape)
        return (jax.tree.map(jnp.add, sums, (total, more)), d_kernel), dx

    start = _zeros(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants), jnp.zeros(kernel_dv.shape, jnp.float32)
    (sums, d_kernel), dx_btd = over_chunks(add_chunk, start, (x_btd, *arrays), n_chunks)
    return sums, (dx_btd, d_kernel.astype(kernel_dv.dtype))


def _backward(loss_of, n_chunks, gradients, cotangents):
    dx_btd, d_kernel = gradients
    cotangent = cotangents[0]
    return (dx_btd * cotangent).astype(dx_btd.dtype), (d_kernel * cotangent).astype(d_kernel.dtype), None, None


_head_loss.defvjp(_forward, _backward)


def _zeros(loss_of, n_chunks, x_btd, kernel_dv, arrays, constants):
    def first(x, kernel_dv, arrays, constants):
        part = [a[:, : a.shape[1] // n_chunks] for a in (x, *arrays)]
        return loss_of(logits_of(part[0], kernel_dv), tuple(part[1:]), constants)

    shapes = jax.eval_shape(first, x_btd, kernel_dv, arrays, constants)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def over_chunks(step, carry, arrays, n_chunks):
    """``lax.scan`` of ``step`` over chunks of the length axis; outputs come back in the order of the length.

    An output is None, or a pytree of arrays (batch, tokens of the chunk, ...).
    """
    if n_chunks == 1:
        return step(carry, arrays)
    chunks = [jnp.moveaxis(a.reshape(a.shape[0], a.shape[1] // n_chunks, n_chunks, *a.shape[2:]), 2, 0) for a in arrays]
    carry, out = jax.lax.scan(step, carry, chunks)

    def in_order(chunks: Array) -> Array:
        a = jnp.moveaxis(chunks, 0, 2)
        return a.reshape(a.shape[0], -1, *a.shape[3:])

    return carry, jax.tree.map(in_order, out)
