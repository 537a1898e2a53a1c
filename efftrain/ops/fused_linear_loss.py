"""Fused linear loss: a loss on the logits of a vocabulary head in chunks of tokens, which never holds all logits."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

CHUNK_ELEMENTS = 2**25  # logits that exist at once on a device: 128 MiB in float32

# (logits (batch, tokens, vocab) float32, the arrays for these tokens, constants) -> (sum, other sums)
LogitsLoss = Callable[[Array, tuple[Array, ...], Any], tuple[Array, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class VocabularyHead:
    """What turns hidden states into logits.

    Attributes:
      kernel_dv: (d_model, vocab), in the dtype of the states.
      bias_v: (vocab,) float32. None: no bias.
      softcap: bound c of the logits, which become ``c tanh(logits / c)`` (Gemma Team 2024, Gemma 2). None: no bound.
    """

    kernel_dv: Array
    bias_v: Array | None = None
    softcap: float | None = field(default=None, metadata={"static": True})

    def products(self, x: Array) -> Array:
        """(..., d_model) -> (..., vocab) float32: the logits before the bound."""
        flat = jnp.matmul(x.reshape(-1, x.shape[-1]), self.kernel_dv, preferred_element_type=jnp.float32)
        y = flat.reshape(*x.shape[:-1], -1)
        return y if self.bias_v is None else y + self.bias_v

    def bounded(self, products: Array) -> Array:
        """The logits of ``products``."""
        return products if self.softcap is None else self.softcap * jnp.tanh(products / self.softcap)

    def logits(self, x: Array) -> Array:
        """(..., d_model) -> (..., vocab) float32."""
        return self.bounded(self.products(x))


def as_head(head: VocabularyHead | Array) -> VocabularyHead:
    """Returns the head; an array is the kernel of a head without bias and bound."""
    return head if isinstance(head, VocabularyHead) else VocabularyHead(head)


def fused_linear_loss(
    loss_of: LogitsLoss,
    x_btd: Array,
    head: VocabularyHead | Array,
    arrays: tuple[Array, ...],
    constants: Any = (),
    *,
    n_chunks: int,
) -> tuple[Array, Any]:
    """Sums a loss on the logits of a head over tokens, together with sums of other figures.

    The gradient is formed in the forward pass, chunk by chunk, so nothing is computed twice. A chunk takes every n-th
    token of each row, which keeps the sharding of batch and length. If ``n_chunks`` does not divide the length, rows
    are padded with tokens of zeros.

    Args:
      loss_of: hashable function; the loss that it returns is () float32, the other sums are a pytree of () float32. A
        token whose arrays are all zero (including its weight) must add nothing to any of them.
      x_btd: (batch, length, d_model) hidden states, any float dtype.
      head: the head, or its kernel (d_model, vocab) in x's dtype.
      arrays: (batch, length, ...) each; not differentiated.
      constants: a pytree that all chunks read, such as the head of a teacher; not differentiated.
      n_chunks: number of chunks, from 1 to the length; see ``choose_chunks``.

    Returns:
      () float32 and the other sums. Differentiable in x and the head; the other sums are not.

    Source: the gradient in the forward pass follows Liger-Kernel (Hsu et al. 2024).
    """
    return _chunked_loss(loss_of, n_chunks, x_btd, as_head(head), arrays, constants)


def choose_chunks(length: int, elements: int) -> int:
    """Returns the number of chunks of a row that keeps a chunk at ``CHUNK_ELEMENTS`` logits or one token.

    It is the smallest such number, or one up to twice as large that divides the length, so that nothing is padded.

    Args:
      length: number of tokens of a row.
      elements: number of logits of all tokens on a device.
    """
    longest = max(length * CHUNK_ELEMENTS // max(elements, 1), 1)
    fewest = -(-length // longest)
    return next((n for n in range(fewest, min(2 * fewest, length) + 1) if length % n == 0), fewest)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(loss_of, n_chunks, x_btd, head, arrays, constants):
    def add_chunk(sums, chunk):
        x, *parts = chunk
        return jax.tree.map(jnp.add, sums, loss_of(head.logits(x), tuple(parts), constants)), None

    zeros = _zeros(loss_of, n_chunks, x_btd, head, arrays, constants)
    return over_chunks(add_chunk, zeros, (x_btd, *arrays), n_chunks)[0]


def _forward(loss_of, n_chunks, x_btd, head, arrays, constants):
    kernel_dv = head.kernel_dv

    def add_chunk(carry, chunk):
        sums, d_head = carry
        x, *parts = chunk
        total, pull, more = jax.vjp(
            lambda products: loss_of(head.bounded(products), tuple(parts), constants), head.products(x), has_aux=True
        )
        d_products = pull(jnp.ones_like(total))[0]
        d_bias = None if head.bias_v is None else d_head.bias_v + d_products.sum((0, 1))
        d_products = d_products.astype(x.dtype)
        flat_x, flat_d = x.reshape(-1, x.shape[-1]), d_products.reshape(-1, d_products.shape[-1])
        d_kernel = d_head.kernel_dv + jax.lax.dot_general(
            flat_x, flat_d, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        dx = (flat_d @ kernel_dv.T).reshape(x.shape)
        d_head = replace(head, kernel_dv=d_kernel, bias_v=d_bias)
        return (jax.tree.map(jnp.add, sums, (total, more)), d_head), dx

    sums = _zeros(loss_of, n_chunks, x_btd, head, arrays, constants)
    start = sums, jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
    (sums, d_head), dx_btd = over_chunks(add_chunk, start, (x_btd, *arrays), n_chunks)
    return sums, (dx_btd, jax.tree.map(lambda d, a: d.astype(a.dtype), d_head, head))


def _backward(loss_of, n_chunks, gradients, cotangents):
    cotangent = cotangents[0]
    return *jax.tree.map(lambda d: (d * cotangent).astype(d.dtype), gradients), None, None


_chunked_loss.defvjp(_forward, _backward)


def _zeros(loss_of, n_chunks, x_btd, head, arrays, constants):
    def first(x, head, arrays, constants):
        part = [a[:, : -(-a.shape[1] // n_chunks)] for a in (x, *arrays)]
        return loss_of(head.logits(part[0]), tuple(part[1:]), constants)

    shapes = jax.eval_shape(first, x_btd, head, arrays, constants)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def over_chunks(step, carry, arrays, n_chunks):
    """``lax.scan`` of ``step`` over chunks of the length axis; outputs come back in the order of the tokens.

    If ``n_chunks`` does not divide the length, it is padded with zeros, whose outputs are removed.

    An output is None, or a pytree of arrays (batch, tokens of the chunk, ...).
    """
    if n_chunks == 1:
        return step(carry, arrays)
    length = arrays[0].shape[1]
    filling = -length % n_chunks

    def apart(a: Array) -> Array:
        if filling:
            a = jnp.pad(a, ((0, 0), (0, filling), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(a.shape[0], -1, n_chunks, *a.shape[2:]), 2, 0)

    carry, out = jax.lax.scan(step, carry, [apart(a) for a in arrays])

    def in_order(chunks: Array) -> Array:
        a = jnp.moveaxis(chunks, 0, 2)
        return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :length]

    return carry, jax.tree.map(in_order, out)
