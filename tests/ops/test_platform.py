import jax
import jax.numpy as jnp
import pytest

from efftrain.ops.platform import conditional
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import use


def double(x):
    return 2 * x, {"n": x.sum()}


def keep(x):
    return x, {"n": jnp.zeros(())}


@pytest.mark.parametrize("wanted", [True, False])
def test_a_condition_says_the_same_on_several_cpu_devices(wanted):
    """There both branches are computed; value and gradient are those of the one that is wanted."""
    x = jnp.arange(16.0)

    def run(x, wanted):
        y, figures = conditional(wanted, double, keep, x)
        return (y**2).sum() + figures["n"]

    alone = jax.jit(jax.value_and_grad(run))(x, wanted)
    with use(make_mesh(MeshConfig(fsdp=8))):
        spread = jax.jit(jax.value_and_grad(run))(x, wanted)
        assert " cond[" not in str(jax.make_jaxpr(run)(x, wanted))
    assert " cond[" in str(jax.make_jaxpr(run)(x, wanted))
    for a, b in zip(alone, spread, strict=True):
        assert jnp.allclose(a, b)
