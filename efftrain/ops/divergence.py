"""Divergences of a student's next-token distribution from its teacher's, and the distillation losses made from them.

The teacher is given by its states and head, or by the part of its distribution that a cache keeps.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.ops.cross_entropy import at_targets
from efftrain.ops.fused_linear_loss import VocabularyHead, as_head, choose_chunks, fused_linear_loss

LOG_OF_ZERO = math.log(np.finfo(np.float32).tiny)  # used as the logarithm of a probability of 0, which is masked
SMALLEST_TAIL = 1e-6  # added to a student's probability outside the kept tokens, since float32 resolves no less


def generalized_jsd(student_logits: Array, teacher_logits: Array, beta: float) -> Array:
    """Generalised Jensen-Shannon divergence between two next-token distributions.

    With the mixture ``m = (1 - beta) student + beta teacher`` it is
    ``beta KL(teacher || m) + (1 - beta) KL(student || m)``. This vanishes for beta 0 and 1, for which the
    source defines it as the KL divergence that it approaches up to a factor.

    Args:
      student_logits: (..., vocab), any float dtype; computed in float32. Entries of -inf (a padded vocabulary) have no
        gradient, and cost 87 nats for each unit of the teacher's probability on them.
      teacher_logits: (..., vocab); -inf is a probability of 0.
      beta: 0 gives forward KL(teacher || student), 1 gives reverse KL(student || teacher).

    Returns:
      (...) nats. Callers mask and sum; nothing is averaged here.

    Source: Agarwal et al. 2024 (GKD), equation 1.
    """
    log_s, log_t = _log_probabilities(student_logits), _log_probabilities(teacher_logits)
    if beta == 0:
        return _kl(log_t, log_s)
    if beta == 1:
        return _kl(log_s, log_t)
    log_m = jnp.logaddexp(jnp.log1p(-beta) + log_s, jnp.log(beta) + log_t)
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _log_probabilities(logits: Array) -> Array:
    """``log_softmax`` in float32, finite even if a logit is -inf: 0 times the logarithm of 0 would be NaN."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.where(log_p == -jnp.inf, LOG_OF_ZERO, log_p)


def _kl(log_p: Array, log_q: Array) -> Array:
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def kept_divergence(student_logits: Array, ids: Array, probs: Array, *, tail: bool) -> Array:
    """Divergence of a student from the part of its teacher's distribution that a cache keeps.

    Args:
      student_logits: (..., vocab); for -inf see ``generalized_jsd``.
      ids: (..., k) integers, the kept tokens; entries of probability 0 do not count.
      probs: (..., k) float32, the teacher's probabilities of the kept tokens.
      tail: True: the probabilities are the largest ones, and all other tokens are one more bucket. The result is
        KL(teacher || student) over these buckets, a lower bound of the whole; with renormalised probabilities and no
        bucket, the student would become overconfident. False: the probabilities are shares of samples, which give an
        unbiased estimate of the cross entropy to the teacher.

    Returns:
      (...) nats.

    Source: Goddard et al. 2024 (DistillKit) for the bucket; Anshumann et al. 2025 (sparse logit sampling), section 3.
    """
    log_s = _log_probabilities(student_logits)
    log_k = jnp.take_along_axis(log_s, ids, axis=-1)
    cross = -(probs * log_k).sum(-1)
    if not tail:
        return cross
    rest_t = jnp.clip(1 - probs.sum(-1), 0)
    rest_s = 1 - (jnp.exp(log_k) * (probs > 0)).sum(-1)
    negative_entropy = jax.scipy.special.xlogy(probs, probs).sum(-1) + jax.scipy.special.xlogy(rest_t, rest_t)
    return negative_entropy + cross - rest_t * jnp.log(jnp.maximum(rest_s, 0) + SMALLEST_TAIL)


def distillation_loss(
    x_btd: Array,
    head: VocabularyHead | Array,
    targets_bt: Array,
    weights_bt: Array,
    teacher_btd: Array,
    teacher_head: VocabularyHead | Array,
    *,
    alpha: Array | float = 1.0,
    temperature: Array | float = 1.0,
    beta: float = 0.0,
    n_chunks: int | None = None,
    shards: int = 1,
) -> tuple[Array, Array, Array]:
    """``alpha T^2 D + (1 - alpha) CE`` summed over tokens: D of the distributions at temperature T, CE of the targets.

    The factor T^2 keeps the size of the gradient independent of T.

    Args:
      x_btd: (batch, length, d_model) states of the student.
      head: head of the student, see ``fused_linear_loss``.
      targets_bt, weights_bt: see ``cross_entropy``.
      teacher_btd, teacher_head: states and head of the teacher, whose width may differ; not differentiated.
      alpha, temperature: () float32, or numbers.
      beta: see ``generalized_jsd``.
      n_chunks, shards: see ``cross_entropy``; a chunk has the logits of both models.

    Returns:
      () float32 nats, summed: the loss; the cross entropy; and KL(teacher || student) at temperature 1, the only one of
      the three that can be compared between schedules.

    Source: Hinton et al. 2015, section 2.
    """
    batch, length, _ = x_btd.shape
    head = as_head(head)
    if n_chunks is None:
        n_chunks = choose_chunks(length, 2 * batch * length * head.kernel_dv.shape[1] // shards)
    loss_of = partial(_to_teacher, beta=beta, as_is=isinstance(temperature, float | int) and temperature == 1)
    arrays = targets_bt.astype(jnp.int32), weights_bt.astype(jnp.float32), teacher_btd
    constants = as_head(teacher_head), jnp.float32(alpha), jnp.float32(temperature)
    loss, (nll, divergence) = fused_linear_loss(loss_of, x_btd, head, arrays, constants, n_chunks=n_chunks)
    return loss, nll, divergence


def kept_distillation_loss(
    x_btd: Array,
    head: VocabularyHead | Array,
    targets_bt: Array,
    weights_bt: Array,
    ids_btk: Array,
    probs_btk: Array,
    *,
    tail: bool,
    alpha: Array | float = 1.0,
    n_chunks: int | None = None,
    shards: int = 1,
) -> tuple[Array, Array, Array]:
    """As ``distillation_loss``, from the part of the teacher's distribution in a cache; see ``kept_divergence``."""
    batch, length, _ = x_btd.shape
    head = as_head(head)
    if n_chunks is None:
        n_chunks = choose_chunks(length, batch * length * head.kernel_dv.shape[1] // shards)
    arrays = targets_bt.astype(jnp.int32), weights_bt.astype(jnp.float32), ids_btk, probs_btk
    loss_of = partial(_to_kept, tail=tail)
    loss, (nll, divergence) = fused_linear_loss(loss_of, x_btd, head, arrays, jnp.float32(alpha), n_chunks=n_chunks)
    return loss, nll, divergence


# A partial(...) is hashed by identity, so that an equal one is traced again; it has no other effect.


def _to_teacher(logits: Array, arrays: tuple[Array, ...], constants: Any, *, beta: float, as_is: bool):
    targets, weights, teacher_states = arrays
    teacher_head, alpha, temperature = constants
    teacher_logits = teacher_head.logits(teacher_states)
    nll = -at_targets(_log_probabilities(logits), targets)
    if as_is:
        divergence = generalized_jsd(logits, teacher_logits, beta)
    else:
        divergence = temperature**2 * generalized_jsd(logits / temperature, teacher_logits / temperature, beta)
    plain = divergence if as_is and beta == 0 else generalized_jsd(logits, teacher_logits, 0.0)
    return _sums(alpha * divergence + (1 - alpha) * nll, nll, plain, weights)


def _to_kept(logits: Array, arrays: tuple[Array, ...], alpha: Array, *, tail: bool):
    targets, weights, ids, probs = arrays
    nll = -at_targets(_log_probabilities(logits), targets)
    divergence = kept_divergence(logits, ids, probs, tail=tail)
    return _sums(alpha * divergence + (1 - alpha) * nll, nll, divergence, weights)


def _sums(loss: Array, nll: Array, divergence: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return (loss * weights).sum(), ((nll * weights).sum(), (divergence * weights).sum())
