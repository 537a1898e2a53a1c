"""How far a distribution over the vocabulary is from another one, in chunks of tokens."""

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.cross_entropy import choose_chunks, over_chunks


def forward_kl(
    x_btd: Array, kernel_dv: Array, teacher_btd: Array, teacher_dv: Array, weights_bt: Array, *, shards: int = 1
) -> Array:
    """Weighted sum over tokens of the divergence of the student's next-token distribution from the teacher's.

    Logits are formed again in the backward pass: no two tensors of all logits exist.

    Args:
      x_btd: (batch, length, d_model) states of the student.
      kernel_dv: (d_model, vocab), its head.
      teacher_btd, teacher_dv: of the teacher, of whose width they may be; not differentiated.
      weights_bt: (batch, length) float32 or bool.
      shards: see ``cross_entropy``.

    Returns:
      () float32 nats: the sum of ``KL(teacher || student)``. Source: Hinton et al. 2015, at temperature 1.
    """
    batch, length, _ = x_btd.shape
    n_chunks = choose_chunks(length, 2 * batch * length * kernel_dv.shape[1] // shards)

    kernel_32 = kernel_dv.astype(jnp.float32)  # its gradient adds up over the chunks

    @jax.checkpoint
    def add_chunk(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        x, teacher, weights = chunk
        log_p = jax.nn.log_softmax(_logits(x, kernel_32.astype(kernel_dv.dtype)))
        log_t = jax.nn.log_softmax(jax.lax.stop_gradient(_logits(teacher, teacher_dv)))
        divergence = (jnp.exp(log_t) * (log_t - log_p)).sum(-1)
        return total + (divergence * weights).sum(), None

    arrays = (x_btd, teacher_btd, weights_bt.astype(jnp.float32))
    return over_chunks(add_chunk, jnp.zeros(()), arrays, n_chunks)[0]


def _logits(x: Array, kernel_dv: Array) -> Array:
    flat = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel_dv, preferred_element_type=jnp.float32)
    return flat.reshape(*x.shape[:-1], -1)
