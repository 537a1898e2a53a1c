"""Chunked cross entropy and its hand-written gradient against float64 and optax."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efftrain.ops import fused_linear_loss as module
from efftrain.ops.cross_entropy import cross_entropy, token_nll
from efftrain.ops.fused_linear_loss import VocabularyHead, choose_chunks

BATCH, LENGTH, D, VOCAB = 3, 8, 5, 11


def draw(dtype="float32", size=1.0):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH, LENGTH, D)) * size, dtype)
    kernel = jnp.asarray(rng.normal(size=(D, VOCAB)), dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (BATCH, LENGTH)), jnp.int32)
    weights = jnp.asarray(rng.uniform(0.2, 2, (BATCH, LENGTH)) * (rng.random((BATCH, LENGTH)) > 0.3), jnp.float32)
    assert (weights == 0).any()
    return x, kernel, targets, weights


def truth(x, kernel, targets, weights):
    """Loss and its gradients for x and the kernel, from the definition."""
    x, kernel, weights = (np.asarray(a, np.float64) for a in (x, kernel, weights))
    logits = x @ kernel
    logits -= logits.max(-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    one_hot = np.eye(kernel.shape[1])[targets]
    d_logits = (np.exp(log_p) - one_hot) * weights[..., None]
    loss = -((log_p * one_hot).sum(-1) * weights).sum()
    return loss, (d_logits @ kernel.T, np.einsum("btd,btv->dv", x, d_logits))


def value_and_gradients(x, kernel, targets, weights, **options):
    loss = partial(cross_entropy, **options)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel, targets, weights)


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 5, 8, None])
def test_value_and_gradients(n_chunks):
    """3 and 5 do not divide the 8 tokens of a row."""
    given = draw()
    chex.assert_trees_all_close(value_and_gradients(*given, n_chunks=n_chunks), truth(*given), rtol=1e-5, atol=2e-6)
    without_gradient = jax.jit(partial(cross_entropy, n_chunks=n_chunks))(*given)
    np.testing.assert_allclose(without_gradient, truth(*given)[0], rtol=1e-6)


@pytest.mark.parametrize("n_chunks", [1, 3])
@pytest.mark.parametrize(("has_bias", "softcap"), [(True, None), (False, 1.5), (True, 1.5)])
def test_a_head_with_a_bias_and_a_bound(n_chunks, has_bias, softcap):
    x, kernel, targets, weights = draw()
    bias = jnp.linspace(-1.0, 1.0, VOCAB) if has_bias else None

    def plain(x, head):
        logits = x @ head.kernel_dv + (0 if head.bias_v is None else head.bias_v)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()

    head = VocabularyHead(kernel, bias, softcap)
    found = value_and_gradients(x, head, targets, weights, n_chunks=n_chunks)
    chex.assert_trees_all_close(found, jax.value_and_grad(plain, (0, 1))(x, head), rtol=1e-4, atol=1e-5)


def test_value_and_gradients_are_those_of_optax():
    x, kernel, targets, weights = draw()

    def plain(x, kernel):
        nll = optax.softmax_cross_entropy_with_integer_labels(x @ kernel, targets)
        return (nll * weights).sum()

    expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(x, kernel)
    given = value_and_gradients(x, kernel, targets, weights, n_chunks=4)
    chex.assert_trees_all_close(given, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("n_chunks", [1, 4])
def test_bfloat16_inputs(n_chunks):
    """The sum is float32's; gradients come back in bfloat16, at its precision."""
    given = draw("bfloat16")
    loss, gradients = value_and_gradients(*given, n_chunks=n_chunks)
    expected, expected_gradients = truth(*given)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(gradient, np.float32), wanted, atol=0.01 * np.abs(wanted).max())


def test_gradients_follow_the_cotangent():
    """A loss that is divided by the token count, or scaled, must scale both gradients."""
    x, kernel, targets, weights = draw()
    loss = lambda x, kernel: jnp.square(cross_entropy(x, kernel, targets, weights, n_chunks=2)) * 0.25  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, kernel)
    value, expected = truth(x, kernel, targets, weights)
    chex.assert_trees_all_close(gradients, jax.tree.map(lambda g: g * value * 0.5, expected), rtol=1e-5, atol=2e-5)


def test_a_masked_token_counts_for_nothing_whatever_it_holds():
    x, kernel, targets, _ = draw()
    mask = np.ones((BATCH, LENGTH), bool)
    mask[1, 3:] = False
    before = value_and_gradients(x, kernel, targets, mask, n_chunks=2)
    garbage_x, garbage_targets = jnp.where(mask[..., None], x, 50), jnp.where(mask, targets, 0)
    after = value_and_gradients(garbage_x, kernel, garbage_targets, mask, n_chunks=2)
    chex.assert_trees_all_close(after[0], before[0], rtol=1e-6)
    chex.assert_trees_all_close(after[1][1], before[1][1], rtol=1e-5, atol=1e-6)
    assert not np.asarray(after[1][0])[~mask].any()
    np.testing.assert_allclose(before[0], truth(x, kernel, targets, mask)[0], rtol=1e-6)


def test_nothing_that_counts_gives_zero_and_not_nan():
    x, kernel, targets, weights = draw()
    loss, gradients = value_and_gradients(x, kernel, targets, weights * 0, n_chunks=2)
    assert loss == 0
    assert not any(np.asarray(g).any() for g in gradients)


def test_huge_logits_do_not_overflow():
    given = draw(size=1e4)
    loss, gradients = value_and_gradients(*given, n_chunks=4)
    expected, expected_gradients = truth(*given)
    assert expected > 1e4
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradients, expected_gradients, rtol=1e-4, atol=0.1)


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int32])
def test_small_integer_targets_work_with_a_larger_vocabulary(dtype):
    """Token 3 in uint8 is not also token 259."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((1, 4, 5), (5, 300)))
    given = x, kernel, jnp.asarray([[3, 0, 43, 255]], dtype), jnp.ones((1, 4))
    chex.assert_trees_all_close(value_and_gradients(*given, n_chunks=2), truth(*given), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("differentiate", [True, False])
def test_the_logits_of_the_batch_never_exist(differentiate):
    """Temporary memory of the compiled program, against the logits that the plain formula would hold."""
    batch, length, d, vocab = 4, 256, 16, 8192
    full = batch * length * vocab * 4
    shapes = [(batch, length, d), (d, vocab), (batch, length), (batch, length)]
    dtypes = [jnp.float32, jnp.float32, jnp.int32, jnp.float32]
    arguments = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, dtypes, strict=True)]

    def temporary(n_chunks):
        loss = partial(cross_entropy, n_chunks=n_chunks)
        function = jax.value_and_grad(loss, argnums=(0, 1)) if differentiate else loss
        return jax.jit(function).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    assert temporary(1) >= 0.9 * full  # the measure does see them
    assert temporary(64) < full / 10


@pytest.mark.parametrize("length", [1, 12, 13, 64, 4093, 4096])
@pytest.mark.parametrize("ratio", [0.01, 1, 1.01, 5, 12, 1000])
def test_the_chosen_chunks_are_the_fewest_that_fit(length, ratio):
    """Of any length, and the fewest that divide it where there are some among the next ones."""
    elements = int(ratio * module.CHUNK_ELEMENTS)
    chosen = choose_chunks(length, elements)

    def fits(n):
        return -(-length // n) * elements / length <= module.CHUNK_ELEMENTS

    fewest = next((n for n in range(1, length + 1) if fits(n)), length)
    even = [n for n in range(1, length + 1) if length % n == 0 and fits(n)]
    assert fits(chosen) or chosen == length
    assert chosen == (even[0] if even and even[0] <= 2 * fewest else fewest)


def test_shards_need_fewer_chunks(monkeypatch):
    """Eight devices hold an eighth of a chunk each; the result is the same."""
    given, seen = draw(), []
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", BATCH * VOCAB)  # one token of each row
    inner = module._chunked_loss
    monkeypatch.setattr(module, "_chunked_loss", lambda *a: seen.append(a[1]) or inner(*a))
    losses = [jax.jit(partial(cross_entropy, shards=shards))(*given) for shards in (1, 4, 8)]
    assert seen == [8, 2, 1]
    np.testing.assert_allclose(losses, truth(*given)[0], rtol=1e-6)


def test_token_nll():
    x, kernel, targets, _ = draw()
    rounded = (x @ kernel).astype(jnp.bfloat16)
    nll, logits = token_nll(rounded, targets), np.asarray(rounded, np.float64)
    assert nll.dtype == jnp.float32
    expected = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, expected, rtol=1e-5)
