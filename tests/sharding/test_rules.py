"""Logical axes become mesh axes, and whatever does not fit is refused with a sentence that helps."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.errors import ConfigError
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules, constrain, shard_count, use


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


@pytest.mark.smoke
def test_each_dimension_goes_to_its_axis(mesh):
    assert DEFAULT_RULES.resolve(("embed", "mlp"), (8, 6), mesh) == PartitionSpec("fsdp", "tensor")
    assert DEFAULT_RULES.resolve(("layers", "embed", None), (3, 8, 5), mesh) == PartitionSpec(None, "fsdp")
    assert DEFAULT_RULES.resolve(("norm",), (7,), mesh) == PartitionSpec()


def test_one_dimension_over_several_axes():
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, context=2))
    spec = DEFAULT_RULES.resolve(("batch", "length", None), (4, 6, 3), mesh)
    assert spec == PartitionSpec(("replica", "fsdp"), "context")
    assert NamedSharding(mesh, spec).shard_shape((4, 6, 3)) == (1, 3, 3)


def test_several_axes_must_divide_together():
    """6 rows go over 2 replicas, and over 2 fsdp, but not over both."""
    mesh = make_mesh(MeshConfig(replica=2, fsdp=2, context=2))
    with pytest.raises(ConfigError) as error:
        DEFAULT_RULES.resolve(("batch",), (6,), mesh, name="tokens")
    assert str(error.value) == (
        "tokens: dimension 0 (batch) has size 6, which mesh axis replica=2 x fsdp=2 cannot split 4 ways; "
        "make 6 a multiple of 4, choose a mesh whose replica x fsdp divides 6, or keep the dimension whole: "
        "give train_and_score or fit rules=DEFAULT_RULES.replace(batch=None)"
    )


def test_dimension_that_does_not_divide(mesh):
    with pytest.raises(ConfigError) as error:
        DEFAULT_RULES.resolve(("embed", "mlp"), (10, 6), mesh, name="mlp.gate.kernel")
    assert str(error.value).startswith(
        "mlp.gate.kernel: dimension 0 (embed) has size 10, which mesh axis fsdp=4 cannot split 4 ways; "
        "make 10 a multiple of 4"
    )


def test_a_head_is_not_cut(mesh):
    """3 heads of 4 columns: 12 divides by 2, 3 does not."""
    assert DEFAULT_RULES.resolve(("embed", "heads"), (8, 12), mesh) == PartitionSpec("fsdp", "tensor")
    with pytest.raises(ConfigError) as error:
        DEFAULT_RULES.resolve(("embed", "heads"), (8, 12), mesh, units=(8, 3), name="query")
    assert "query: dimension 1 (heads) has size 12, in 3 pieces of 4, which mesh axis tensor=2" in str(error.value)


def test_units_that_are_no_units(mesh):
    with pytest.raises(ConfigError, match="has size 12, which its 5 units do not divide"):
        DEFAULT_RULES.resolve(("embed", "heads"), (8, 12), mesh, units=(8, 5))


def test_unknown_logical_axis(mesh):
    with pytest.raises(ConfigError) as error:
        DEFAULT_RULES.resolve(("embed", "mpl"), (8, 8), mesh, name="gate")
    assert "gate: there is no sharding rule for the logical axis 'mpl' (known: batch, choices," in str(error.value)
    assert "add one: give train_and_score or fit rules=DEFAULT_RULES.replace(mpl=...)" in str(error.value)


def test_two_dimensions_on_one_mesh_axis(mesh):
    with pytest.raises(ConfigError) as error:
        DEFAULT_RULES.resolve(("heads", "mlp"), (8, 8), mesh, name="odd")
    assert "odd: dimensions 0 (heads) and 1 (mlp) both go to mesh axis tensor" in str(error.value)


def test_axes_of_size_one_never_raise():
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    assert DEFAULT_RULES.resolve(("heads", "mlp"), (3, 5), mesh) == PartitionSpec()


def test_rule_for_an_axis_that_the_mesh_lacks():
    mesh = jax.make_mesh((8,), ("data",))
    with pytest.raises(ConfigError, match="names the mesh axis 'fsdp', but the mesh has data"):
        DEFAULT_RULES.resolve(("embed",), (8,), mesh)


def test_axes_of_another_rank(mesh):
    with pytest.raises(ConfigError, match="differ in length"):
        DEFAULT_RULES.resolve(("embed",), (8, 8), mesh)


def test_rule_with_one_axis_twice():
    with pytest.raises(ConfigError, match="names a mesh axis twice"):
        ShardingRules({"embed": ("fsdp", "fsdp")})


def test_changed_rules_leave_the_old_ones_alone(mesh):
    rules = DEFAULT_RULES.replace(heads=None, states="tensor")
    assert rules.resolve(("heads", "states"), (3, 4), mesh) == PartitionSpec(None, "tensor")
    assert DEFAULT_RULES.resolve(("heads",), (4,), mesh) == PartitionSpec("tensor")
    assert rules != DEFAULT_RULES
    assert hash(rules.replace()) == hash(rules)


def constrained(x_btf):
    return constrain(x_btf, "batch", "length", "mlp") * 2


def test_constrain_places_activations(mesh):
    with use(mesh):
        y = jax.jit(constrained)(jnp.ones((8, 3, 6)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp", None, "tensor")), 3)


def test_constrain_holds_inside_scan_vmap_and_grad(mesh):
    def loss(x_bf):
        body = lambda carry, x: (carry + jnp.sin(constrain(x, "batch", "mlp")).sum(), None)  # noqa: E731
        return jax.lax.scan(body, 0.0, jnp.stack([x_bf, 2 * x_bf]))[0]

    x = jnp.arange(48.0).reshape(8, 6)
    with use(mesh):
        gradient = jax.jit(jax.grad(loss))(x)
        rows = jax.jit(jax.vmap(lambda r: constrain(r, "batch")))(x.T)
    assert jnp.allclose(gradient, jnp.cos(x) + 2 * jnp.cos(2 * x), atol=1e-5)
    assert rows.sharding.shard_shape(rows.shape)[1] == 2


def test_constrain_does_nothing_on_one_device_or_without_a_mesh():
    program = jax.jit(constrained).lower(jnp.ones((3, 3, 5))).as_text()
    assert "sharding" not in program.lower().replace("num_partitions", "")
    with use(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert jax.jit(constrained)(jnp.ones((3, 3, 5))).shape == (3, 3, 5)


def test_constrain_leaves_shard_map_alone(mesh):
    with use(mesh):
        split = jax.shard_map(
            lambda x: constrain(x, "batch", None),
            in_specs=PartitionSpec("fsdp"),
            out_specs=PartitionSpec("fsdp"),
        )
        assert jax.jit(split)(jnp.ones((8, 3))).shape == (8, 3)


def test_constrain_names_the_activation_that_does_not_divide(mesh):
    with use(mesh), pytest.raises(ConfigError) as error:
        jax.jit(constrained)(jnp.ones((6, 3, 6)))
    assert "activation (batch, length, mlp) of shape (6, 3, 6): dimension 0 (batch) has size 6" in str(error.value)


def test_a_compiled_function_follows_the_mesh_and_the_rules(mesh):
    """jax.jit knows nothing of the rules: a stale program would keep the old layout."""
    step, x = jax.jit(constrained), jnp.ones((8, 3, 8))

    def shard(mesh, rules=DEFAULT_RULES):
        with use(mesh, rules):
            return step(x).sharding.shard_shape(x.shape)

    assert step(x).sharding.is_fully_replicated
    assert shard(mesh) == (2, 3, 4)
    assert shard(mesh, DEFAULT_RULES.replace(batch=None)) == (8, 3, 4)
    assert shard(make_mesh(MeshConfig())) == (1, 3, 8)
    assert shard(mesh) == (2, 3, 4)
    assert step(x).sharding.is_fully_replicated


def test_the_same_rules_do_not_compile_again(mesh):
    traces = []

    @jax.jit
    def step(x):
        traces.append(x.shape)
        return constrain(x, "batch", None)

    for _ in range(3):
        with use(make_mesh(MeshConfig(fsdp=4, tensor=2)), DEFAULT_RULES.replace()):
            step(jnp.ones((8, 2)))
    assert len(traces) == 1


def test_shard_count(mesh):
    assert shard_count("batch", "length") == 1
    with use(mesh):
        assert shard_count("batch", "length") == 4
        assert shard_count("batch", None, "mlp") == 8
