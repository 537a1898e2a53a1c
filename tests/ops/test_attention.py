"""Blocked and cached attention against loops over single tokens in float64."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.attention import cached_attention, causal_attention

attend = partial(jax.jit, static_argnames=("window", "n_blocks"))(causal_attention)
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]], np.int32)


def draw(*, batch=2, length=13, heads=4, kv_heads=2, d_head=6, dtype="float32", seed=0):
    """Random q, k, v; what the test compares with gets the same rounded numbers."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, length, n, d_head) for n in (heads, kv_heads, kv_heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def naive(q, k, v, segments=None, window=None):
    """One query at a time: softmax over the keys it may see, heads in consecutive groups on one kv head."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, heads, d_head = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if window is None or t - s < window]
            seen = [s for s in seen if segments is None or segments[b, s] == segments[b, t]]
            for h in range(heads):
                g = h // (heads // k.shape[2])
                scores = k[b, seen, g] @ q[b, t, h] / np.sqrt(d_head)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, seen, g]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.smoke
def test_each_token_attends_to_what_it_may_see(kv_heads, segments, window):
    q, k, v = draw(kv_heads=kv_heads)
    out = attend(q, k, v, segments_bs=segments, window=window)
    np.testing.assert_allclose(out, naive(q, k, v, segments, window), atol=2e-6)


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 5, 40])
def test_the_number_of_blocks_changes_nothing(n_blocks):
    """7 tokens: no number of blocks but 1 divides them; 40 blocks are more than there are tokens."""
    q, k, v = draw(length=7)
    segments = SEGMENTS[:, :7]
    out = attend(q, k, v, segments_bs=segments, window=3, n_blocks=n_blocks)
    np.testing.assert_allclose(out, naive(q, k, v, segments, window=3), atol=2e-6)


def test_a_row_of_one_token_is_its_value():
    q, k, v = draw(length=1, kv_heads=4)
    np.testing.assert_allclose(attend(q, k, v), v, atol=1e-6)


def test_bfloat16_stays_bfloat16_and_near_the_truth():
    q, k, v = draw(length=64, dtype="bfloat16")
    out = attend(q, k, v, n_blocks=3)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), naive(q, k, v), atol=0.02)


def test_huge_scores_do_not_overflow():
    """Scores of about 1e5: without the subtraction of the maximum, exp gives inf and the output is nan."""
    q, k, v = draw()
    q, k = q * 200, k * 200
    out = attend(q, k, v)
    np.testing.assert_allclose(out, naive(q, k, v), atol=1e-4)
    gradient = jax.jit(jax.grad(lambda q: causal_attention(q, k, v).sum()))(q)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("window", "n_blocks"), [(None, 4), (5, 3)])
def test_gradients_are_those_of_the_plain_formula(window, n_blocks):
    q, k, v = draw()
    direction = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)
    distance = np.arange(13)[:, None] - np.arange(13)
    mask = (distance >= 0) & (distance < (window or 99)) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])

    def plain(q, k, v):
        scores = jnp.einsum("bthd,bshd->bhts", q, k.repeat(2, axis=2)) / np.sqrt(6)
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf))
        return (jnp.einsum("bhts,bshd->bthd", weights, v.repeat(2, axis=2)) * direction).sum()

    def blocked(q, k, v):
        out = causal_attention(q, k, v, segments_bs=SEGMENTS, window=window, n_blocks=n_blocks)
        return (out * direction).sum()

    chex.assert_trees_all_close(*(jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v) for f in (blocked, plain)), atol=3e-6)


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_a_document_never_moves_another_in_its_row(n_blocks):
    q, k, v = draw()
    changed = SEGMENTS == 2
    elsewhere = [jnp.where(changed[..., None, None], a + 7, a) for a in (q, k, v)]
    before, after = (attend(*qkv, segments_bs=SEGMENTS, n_blocks=n_blocks) for qkv in ((q, k, v), elsewhere))
    chex.assert_trees_all_equal(before[~changed], after[~changed])
    assert jnp.abs(before - after)[changed].min(axis=-1).max() > 1  # the change did reach document 2


@pytest.mark.parametrize("n_blocks", [1, 4])
def test_no_gradient_crosses_a_document_boundary(n_blocks):
    def outputs_of_document_2(q, k, v):
        out = causal_attention(q, k, v, segments_bs=SEGMENTS, n_blocks=n_blocks)
        return (out[SEGMENTS == 2] ** 2).sum()

    for gradient in jax.jit(jax.grad(outputs_of_document_2, (0, 1, 2)))(*draw()):
        assert not np.asarray(gradient)[SEGMENTS != 2].any()
        assert np.asarray(gradient)[SEGMENTS == 2].any()


def test_a_later_token_never_moves_an_earlier_one():
    q, k, v = draw()
    before = attend(q, k, v)
    after = attend(q, k.at[:, 9].add(3), v.at[:, 9].add(3))
    chex.assert_trees_all_equal(before[:, :9], after[:, :9])
    assert jnp.abs(before - after)[:, 9:].max() > 0.1


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_gives_what_the_whole_row_gives(window, kv_heads):
    """Rows at different positions, a few new tokens each, huge numbers in every slot that is not yet written."""
    q, k, v = draw(kv_heads=kv_heads)
    truth = naive(q, k, v, window=window)
    for starts in ([0, 0], [3, 7], [9, 1]):
        positions = np.array(starts)[:, None] + np.arange(4)
        rows, unwritten = np.arange(2)[:, None], np.arange(20) > positions[:, -1:]
        k_bksd, v_bksd = (np.pad(a, ((0, 0), (0, 7), (0, 0), (0, 0))).swapaxes(1, 2) for a in (k, v))
        for cache in (k_bksd, v_bksd):
            cache[np.broadcast_to(unwritten[:, None], cache.shape[:3])] = 1e30
        out = jax.jit(partial(cached_attention, window=window))(q[rows, positions], k_bksd, v_bksd, positions)
        np.testing.assert_allclose(out, truth[rows, positions], atol=2e-6)
