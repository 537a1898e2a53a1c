"""Distillation losses against their definitions in float64, and what a cache keeps against the whole."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efftrain.ops.divergence import (
    _to_kept,
    distillation_loss,
    generalized_jsd,
    kept_distillation_loss,
    kept_divergence,
)
from efftrain.ops.fused_linear_loss import VocabularyHead

BATCH, LENGTH, D, WIDE, VOCAB = 3, 8, 5, 7, 11


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


def jsd(student, teacher, beta):
    """By the definition, with probabilities and not their logarithms."""
    log_s, log_t = log_softmax(student), log_softmax(teacher)
    if beta in (0, 1):
        return kl(log_t, log_s) if beta == 0 else kl(log_s, log_t)
    log_m = np.log((1 - beta) * np.exp(log_s) + beta * np.exp(log_t))
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def draw(seed=0):
    rng = np.random.default_rng(seed)
    x, teacher = rng.normal(size=(BATCH, LENGTH, D)), rng.normal(size=(BATCH, LENGTH, WIDE))
    kernel, teacher_dv = rng.normal(size=(D, VOCAB)), rng.normal(size=(WIDE, VOCAB))
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH))
    weights = rng.random((BATCH, LENGTH)) > 0.3
    return [jnp.asarray(a, jnp.float32 if a.dtype == float else jnp.int32) for a in
            (x, kernel, targets, weights, teacher, teacher_dv)]  # fmt: skip


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_its_definition(beta):
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, VOCAB)) * 3, rng.normal(size=(2, 4, VOCAB)) * 3
    found = generalized_jsd(jnp.asarray(student), jnp.asarray(teacher), beta)
    np.testing.assert_allclose(found, jsd(student, teacher, beta), rtol=2e-5, atol=1e-6)
    assert (found > 0).all()
    np.testing.assert_allclose(generalized_jsd(jnp.asarray(student), jnp.asarray(student + 2), beta), 0, atol=1e-5)


def test_it_is_optax_forward_divergence_and_symmetric_in_the_middle():
    rng = np.random.default_rng(2)
    student, teacher = (jnp.asarray(rng.normal(size=(6, VOCAB)), jnp.float32) for _ in range(2))
    want = optax.losses.kl_divergence(jax.nn.log_softmax(student), jax.nn.softmax(teacher))
    np.testing.assert_allclose(generalized_jsd(student, teacher, 0.0), want, rtol=1e-5)
    both = generalized_jsd(student, teacher, 0.5), generalized_jsd(teacher, student, 0.5)
    np.testing.assert_allclose(*both, rtol=1e-5)


def value_and_gradients(loss, *arrays):
    return jax.value_and_grad(lambda *arrays: loss(*arrays).sum(), argnums=tuple(range(len(arrays))))(*arrays)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("masked", ["teacher", "student", "both"])
def test_a_vocabulary_that_is_padded_by_masking(beta, masked):
    """Two entries are -inf. Against the definition where that is finite; values and gradients are finite always."""
    rng = np.random.default_rng(6)
    student, teacher = (rng.normal(size=(4, VOCAB)).astype(np.float32) for _ in range(2))
    if masked != "teacher":
        student[:, -2:] = -np.inf
    if masked != "student":
        teacher[:, -2:] = -np.inf
    value, (ds, dt) = value_and_gradients(
        lambda s, t: generalized_jsd(s, t, beta), jnp.asarray(student), jnp.asarray(teacher)
    )
    assert np.isfinite(value)
    assert np.isfinite(ds).all()
    assert np.isfinite(dt).all()
    if masked == "both":
        short = [jnp.asarray(a[:, :-2]) for a in (student, teacher)]
        want, gradients = value_and_gradients(lambda s, t: generalized_jsd(s, t, beta), *short)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(ds, np.pad(gradients[0], ((0, 0), (0, 2))), atol=1e-6)
        np.testing.assert_allclose(dt, np.pad(gradients[1], ((0, 0), (0, 2))), atol=1e-6)
    if masked == "teacher" and beta == 0:  # forward KL with a teacher's probability of 0
        log_s, log_t = log_softmax(student), log_softmax(teacher[:, :-2])
        np.testing.assert_allclose(value, kl(log_t, log_s[:, :-2]).sum(), rtol=1e-5)
        np.testing.assert_allclose(ds, np.exp(log_s) - np.pad(np.exp(log_t), ((0, 0), (0, 2))), atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_what_a_cache_keeps_may_name_masked_entries(tail):
    """Entries that fill up a row have id 0 and probability 0; here the student has masked that one."""
    rng = np.random.default_rng(7)
    student = rng.normal(size=(4, VOCAB)).astype(np.float32)
    student[:, 0] = -np.inf
    ids, probs = jnp.tile(jnp.array([3, 5, 0]), (4, 1)), jnp.tile(jnp.array([0.6, 0.3, 0.0]), (4, 1))
    loss = partial(kept_divergence, tail=tail)
    value, (gradient,) = value_and_gradients(lambda s: loss(s, ids, probs), jnp.asarray(student))
    want, (without,) = value_and_gradients(lambda s: loss(s, ids - 1, probs), jnp.asarray(student[:, 1:]))
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.pad(without, ((0, 0), (1, 0))), atol=1e-6)


def test_a_target_that_is_masked_and_does_not_count_changes_nothing():
    _, _, targets, weights, _, _ = draw()
    logits = jnp.asarray(np.random.default_rng(8).normal(size=(BATCH, LENGTH, VOCAB)), jnp.float32)
    logits, targets = logits.at[..., 0].set(-jnp.inf), jnp.where(weights > 0, jnp.maximum(targets, 1), 0)
    probs = jnp.full((BATCH, LENGTH, 1), 0.5)
    arrays = targets, weights.astype(jnp.float32), jnp.ones((BATCH, LENGTH, 1), jnp.int32), probs
    value, gradient = jax.value_and_grad(lambda z: _to_kept(z, arrays, 0.7, tail=True)[0])(logits)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_certain_distributions_stay_finite():
    student, teacher = jnp.asarray([[300.0, 0, 0]]), jnp.asarray([[0, 300.0, 0]])
    for beta in (0.0, 0.5, 1.0):
        value, gradient = jax.value_and_grad(lambda s, beta=beta: generalized_jsd(s, teacher, beta).sum())(student)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("n_chunks", [1, 4])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.4), (3.0, 1.0)])
def test_the_loss_and_its_gradient_in_chunks(n_chunks, alpha, temperature, beta):
    x, kernel, targets, weights, teacher, teacher_dv = draw()

    def naive(x, kernel):
        logits, t_logits = x @ kernel, teacher @ teacher_dv
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        far = temperature**2 * generalized_jsd(logits / temperature, t_logits / temperature, beta)
        return ((alpha * far + (1 - alpha) * nll) * weights).sum()

    def chunked(x, kernel):
        return distillation_loss(
            x, kernel, targets, weights, teacher, teacher_dv, alpha=alpha, temperature=temperature, beta=beta,
            n_chunks=n_chunks,
        )  # fmt: skip

    loss, nll, divergence = jax.jit(chunked)(x, kernel)
    logits, t_logits = np.asarray(x @ kernel, np.float64), np.asarray(teacher @ teacher_dv, np.float64)
    picked = np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, -(picked * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(divergence, (jsd(logits, t_logits, 0) * weights).sum(), rtol=1e-5)
    scaled = temperature**2 * jsd(logits / temperature, t_logits / temperature, beta)
    np.testing.assert_allclose(loss, ((alpha * scaled - (1 - alpha) * picked) * weights).sum(), rtol=1e-5)
    found = jax.jit(jax.grad(lambda *a: 2 * chunked(*a)[0], argnums=(0, 1)))(x, kernel)
    wanted = jax.grad(lambda *a: 2 * naive(*a), argnums=(0, 1))(x, kernel)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_teacher():
    x, kernel, targets, weights, teacher, teacher_dv = draw()
    found = jax.grad(lambda t, dv: distillation_loss(x, kernel, targets, weights, t, dv, alpha=0.5)[0], argnums=(0, 1))(
        teacher, teacher_dv
    )
    assert all((np.asarray(g) == 0).all() for g in found)


def top(logits, k):
    probs = jax.nn.softmax(logits)
    kept, ids = jax.lax.top_k(probs, k)
    return ids, kept


def test_what_is_kept_bounds_the_divergence_from_below_and_comes_to_it():
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(size=(5, VOCAB)) * 2, jnp.float32) for _ in range(2))
    whole = jsd(student, teacher, 0)
    before = np.zeros(5)
    for k in (1, 3, 6, VOCAB):
        found = np.asarray(kept_divergence(student, *top(teacher, k), tail=True))
        assert (found <= whole + 1e-5).all()
        assert (found >= before - 1e-5).all()
        before = found
    np.testing.assert_allclose(before, whole, rtol=1e-4, atol=1e-5)


def test_the_tail_is_one_bucket():
    """By the definition over k + 1 buckets; entries of probability 0 do not count, wherever they point."""
    rng = np.random.default_rng(4)
    student, teacher = (np.asarray(rng.normal(size=(5, VOCAB)) * 2) for _ in range(2))
    ids, probs = (np.asarray(a) for a in top(jnp.asarray(teacher), 4))
    q = np.take_along_axis(np.exp(log_softmax(student)), ids, -1)
    p = np.concatenate([probs, 1 - probs.sum(-1, keepdims=True)], -1)
    q = np.concatenate([q, 1 - q.sum(-1, keepdims=True)], -1)
    want = (p * (np.log(p) - np.log(q))).sum(-1)
    padded_ids, padded = np.concatenate([ids, ids[:, :1]], -1), np.concatenate([probs, np.zeros((5, 1))], -1)
    for one, other in ((ids, probs), (padded_ids, padded)):
        found = kept_divergence(jnp.asarray(student), jnp.asarray(one), jnp.asarray(other), tail=True)
        np.testing.assert_allclose(found, want, rtol=1e-4)


def test_a_student_that_matches_the_teacher_on_all_buckets_gets_no_gradient():
    """Renormalised probabilities would pull it away from its teacher."""
    teacher = jnp.asarray(np.random.default_rng(5).normal(size=(4, VOCAB)), jnp.float32)
    ids, probs = top(teacher, 3)
    gradient = jax.grad(lambda s, p, tail: kept_divergence(s, ids, p, tail=tail).sum())
    np.testing.assert_allclose(gradient(teacher, probs, True), 0, atol=1e-6)
    assert jnp.abs(gradient(teacher, probs / probs.sum(-1, keepdims=True), True)).max() > 0.01


def test_samples_estimate_the_cross_entropy_without_bias():
    rng = np.random.default_rng(6)
    student, teacher = rng.normal(size=VOCAB), rng.normal(size=VOCAB)
    p, n, times = np.exp(log_softmax(teacher)), 8, 4000
    ids = rng.choice(VOCAB, (times, n), p=p)
    estimates = kept_divergence(
        jnp.broadcast_to(jnp.asarray(student, jnp.float32), (times, VOCAB)),
        jnp.asarray(ids),
        jnp.full((times, n), 1 / n),
        tail=False,
    )
    want = -(p * log_softmax(student)).sum()
    error = np.std(estimates) / np.sqrt(times)
    assert abs(np.mean(estimates) - want) < 4 * error
    assert error < 0.05 * want


def test_the_kept_loss_in_chunks():
    x, kernel, targets, weights, teacher, teacher_dv = draw()
    ids, probs = top(teacher @ teacher_dv, 4)

    def naive(x, kernel):
        logits = x @ kernel
        nll = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
        return ((0.7 * kept_divergence(logits, ids, probs, tail=True) + 0.3 * nll) * weights).sum()

    chunked = partial(kept_distillation_loss, tail=True, alpha=0.7, n_chunks=3)  # with tokens of zeros at the end

    def loss(x, kernel):
        return chunked(x, kernel, targets, weights, ids, probs)[0]

    np.testing.assert_allclose(loss(x, kernel), naive(x, kernel), rtol=1e-5)
    for got, want in zip(*(jax.grad(f, argnums=(0, 1))(x, kernel) for f in (loss, naive)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_memory_does_not_grow_with_the_logits():
    """At 32k entries two tensors of logits would be 256 MB; of the chunked loss a chunk of each exists."""
    length, vocab = 1024, 32_000
    shapes = [(1, length, 16), (16, vocab), (1, length), (1, length), (1, length, 24), (24, vocab)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]

    def temporary(n_chunks):
        def loss(*a):
            return distillation_loss(*a, n_chunks=n_chunks)[0]

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1) > 2 * length * vocab * 4  # the measure does see them
    assert temporary(64) < temporary(1) / 10


def test_heads_of_student_and_teacher_may_have_biases_and_bounds():
    x, kernel, targets, weights, teacher, teacher_dv = draw()
    head = VocabularyHead(kernel, jnp.linspace(-1.0, 1.0, VOCAB), 1.5)
    teacher_head = VocabularyHead(teacher_dv, jnp.linspace(1.0, 0.0, VOCAB), 3.0)

    def fused(x, head):
        return distillation_loss(x, head, targets, weights, teacher, teacher_head, alpha=0.6, n_chunks=3)[0]

    def plain(x, head):
        logits = 1.5 * jnp.tanh((x @ head.kernel_dv + head.bias_v) / 1.5)
        wanted = 3 * jnp.tanh((teacher @ teacher_dv + teacher_head.bias_v) / 3)
        far = optax.losses.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(wanted))
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return ((0.6 * far + 0.4 * nll) * weights).sum()

    found, want = (jax.value_and_grad(f, (0, 1))(x, head) for f in (fused, plain))
    chex.assert_trees_all_close(found, want, rtol=1e-4, atol=1e-5)
