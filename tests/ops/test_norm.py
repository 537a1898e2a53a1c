"""Root-mean-square normalisation against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efftrain.ops.norm import rms_norm

SCALE = jnp.asarray([0.5, 1.0, -2.0, 3.0], jnp.float32)


def truth(x, eps):
    x64 = np.asarray(x, np.float64)
    return x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + eps) * np.asarray(SCALE, np.float64)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_value(size, eps):
    """At 1e-4 eps outweighs the mean square; at 1e4 it does nothing."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4)) * size, jnp.float32)
    np.testing.assert_allclose(rms_norm(x, SCALE, eps), truth(x, eps), rtol=2e-6)


def test_bfloat16_is_normalised_in_float32():
    """A mean square in bfloat16 would be off by up to 2^-9, and rounding it, the root and the product add up."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)) * 1e4, jnp.bfloat16)
    out = rms_norm(x, SCALE, 1e-6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), truth(x, 1e-6), rtol=2**-8)  # one rounding, at the end


def test_gradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    x, direction, step = rng.normal(size=4), rng.normal(size=4), 1e-6
    gradient = jax.grad(lambda x: (rms_norm(x, SCALE, 1e-5) * direction).sum())(jnp.asarray(x, jnp.float32))
    for i, unit in enumerate(np.eye(4) * step):
        rise = ((truth(x + unit, 1e-5) - truth(x - unit, 1e-5)) * direction).sum() / (2 * step)
        np.testing.assert_allclose(gradient[i], rise, rtol=1e-4, atol=1e-5)
