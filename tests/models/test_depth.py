"""The order of the stack, with layers that write their own digit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models as tiny
from flax import nnx

from efftrain.models.stack import add_metrics, run_layers, stack_layers, unstack


class Digit(nnx.Module):
    """Appends a digit to a number: the number tells which layers ran, and in which order."""

    def __init__(self, rngs):
        self.digit = nnx.Param(jax.random.uniform(rngs.params(), (1, 1)), axes=("batch", "length"), units=(1, 1))

    def __call__(self, x):
        return 10 * x + self.digit[...]


def digits(*values):
    stack = stack_layers(Digit, len(values), nnx.Rngs(0))
    stack.digit[...] = jnp.asarray(values, jnp.float32).reshape(-1, 1, 1)
    return stack


def count(layer, x):
    return layer(x), {"layers": (x.sum(), jnp.ones(()))}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])
@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_pattern_is_repeated_in_order(scan, remat):
    stacks = [digits(1, 3, 5), digits(2, 4, 6)]
    options = {"n_repeats": 3, "scan": scan, "remat": remat}
    out, _, metrics = jax.jit(lambda x: run_layers(stacks, x, count, **options))(jnp.zeros((1, 1)))
    assert out.item() == 123456
    assert metrics == {"layers": (0 + 1 + 12 + 123 + 1234 + 12345, 6)}


def test_the_layers_of_a_decoder_stand_in_that_order():
    model = tiny.build(tiny.config(n_repeats=3))
    model.blocks[0].attention_norm.scale[...] = jnp.broadcast_to(jnp.asarray([[0.0], [2.0], [4.0]]), (3, 16))
    model.blocks[1].attention_norm.scale[...] = jnp.broadcast_to(jnp.asarray([[1.0], [3.0], [5.0]]), (3, 16))
    layers = model.layers()
    assert [layer.attention_norm.scale[0].item() for layer in layers] == [0, 1, 2, 3, 4, 5]
    assert [layer.attention.config for layer in layers] == [block.attention for block in model.config.layers]
    assert layers[0].attention.query.kernel.get_metadata()["axes"] == ("embed", "heads")


def test_stacked_layers_are_the_layers_built_apart():
    """The same keys give the same values, and each layer its own."""
    keys = jax.random.split(nnx.Rngs(0).params(), 3)
    apart = [Digit(nnx.Rngs(params=key)).digit[...] for key in keys]
    stack = stack_layers(Digit, 3, nnx.Rngs(0))
    np.testing.assert_array_equal(stack.digit[...], jnp.stack(apart))
    assert len(set(np.ravel(stack.digit[...]).tolist())) == 3


def test_the_layer_axis_comes_and_goes_with_its_name():
    stack = digits(7, 8)
    assert stack.digit.get_metadata()["axes"] == ("layers", "batch", "length")
    assert stack.digit.get_metadata()["units"] == (2, 1, 1)
    for layer, value in zip(unstack(nnx.state(stack), 2), (7, 8), strict=True):
        assert layer.digit[...].tolist() == [[value]]
        assert layer.digit.get_metadata()["axes"] == ("batch", "length")
        assert layer.digit.get_metadata()["units"] == (1, 1)


def test_gradients_of_unstacked_layers_come_back_stacked():
    graph, state = nnx.split(digits(2, 3))

    def product(state):
        first, second = unstack(state, 2)
        return (nnx.merge(graph, first).digit[...] * nnx.merge(graph, second).digit[...] ** 2).sum()

    gradient = jax.jit(jax.grad(product))(state)
    assert gradient.digit[...].ravel().tolist() == [9, 12]
    assert gradient.digit.get_metadata()["axes"] == ("layers", "batch", "length")


def test_metrics_add_up_by_name():
    """A metric that only some blocks have (the routers') is kept, not dropped."""
    left, right = {"a": (1.0, 2.0), "b": (3.0, 4.0)}, {"b": (10.0, 20.0), "c": (5.0, 6.0)}
    assert add_metrics(left, right) == {"a": (1.0, 2.0), "b": (13.0, 24.0), "c": (5.0, 6.0)}
    assert add_metrics({}, left) == left
