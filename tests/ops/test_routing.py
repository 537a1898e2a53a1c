import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.routing import balance_loss, balanced_bias, entropy, max_violation, route, z_loss

ZERO = jnp.zeros(4)


def routed(logits, bias=ZERO, **changes):
    return route(jnp.asarray(logits), bias, **({"top_k": 2, "scores": "softmax", "renormalize": True} | changes))


def test_softmax_of_the_chosen_is_softmax_then_renormalised():
    logits = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    found = routed(logits)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :2]
    assert np.array_equal(found.experts_nk, best)
    np.testing.assert_allclose(found.gates_nk, jax.nn.softmax(np.take_along_axis(logits, best, -1)), rtol=1e-5)


def test_equal_scores_go_to_the_smaller_number():
    assert routed(np.zeros((3, 4), np.float32)).experts_nk.tolist() == [[0, 1]] * 3


def test_the_bias_chooses_and_does_not_weigh():
    logits = np.array([[2.0, 1.0, 0.0, -1.0]], np.float32)
    found = routed(logits, jnp.array([0.0, 0.0, 0.0, 10.0]), renormalize=False)
    assert {*found.experts_nk[0].tolist()} == {3, 0}
    np.testing.assert_allclose(found.gates_nk[0], jax.nn.softmax(logits[0])[found.experts_nk[0]], rtol=1e-6)


def test_sigmoid_scores_are_independent_of_each_other():
    one = routed([[1.0, 0.0, -1.0, -2.0]], scores="sigmoid", renormalize=False)
    other = routed([[1.0, 0.0, -9.0, -2.0]], scores="sigmoid", renormalize=False)
    np.testing.assert_allclose(one.gates_nk, other.gates_nk)
    np.testing.assert_allclose(one.gates_nk[0], [1 / (1 + np.exp(-1)), 0.5], rtol=1e-6)
    assert float(one.probabilities_ne.sum()) == pytest.approx(1)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_one_expert_a_token_still_teaches_the_router(scores):
    def gate(logits):
        return route(logits, ZERO, top_k=1, scores=scores, renormalize=False).gates_nk.sum()

    assert jnp.abs(jax.grad(gate)(jnp.array([[1.0, 0.0, 0.5, -1.0]]))).max() > 0.05


def test_the_balance_loss_of_even_and_of_collapsed_routing():
    even, collapsed = jnp.full((8, 4), 0.25), jnp.tile(jnp.array([1.0, 0, 0, 0]), (8, 1))
    assert float(balance_loss(jnp.array([2.0, 2, 2, 2]), even)) == pytest.approx(1)
    assert float(balance_loss(jnp.array([8.0, 0, 0, 0]), collapsed)) == pytest.approx(4)


def test_z_loss_and_entropy_by_hand():
    assert float(z_loss(jnp.zeros((3, 4)))) == pytest.approx(np.log(4) ** 2)
    assert entropy(jnp.array([[0.25] * 4, [1.0, 0, 0, 0]])).tolist() == pytest.approx([np.log(4), 0])


def test_the_bias_moves_against_the_load():
    moved = balanced_bias(jnp.zeros(4), jnp.array([5.0, 1, 3, 3]), 0.1)
    np.testing.assert_allclose(moved, [-0.1 * 2 / 3, 0.1 * 2 / 3, 0, 0], atol=1e-7)
    assert float(max_violation(jnp.array([6.0, 2, 2, 2]))) == pytest.approx(1)
