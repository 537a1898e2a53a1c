"""A whole state is laid out from the axes on its variables: parameters, moments, checkpoints."""

import io

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from efftrain.errors import ConfigError
from efftrain.sharding.layout import copy_to, layout, layout_table, state_shardings, with_shardings
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, use


class Small(nnx.Module):
    """One parameter of each kind: split twice, stacked, never split."""

    def __init__(self, rngs: nnx.Rngs):
        normal = jax.random.normal
        self.table = nnx.Param(normal(rngs.params(), (12, 8)), axes=("vocab", "embed"))
        self.query = nnx.Param(normal(rngs.params(), (3, 8, 12)), axes=("layers", "embed", "heads"), units=(3, 8, 4))
        self.scale = nnx.Param(jnp.ones(8), axes=("norm",))


SHARDS = {"table": (6, 2), "query": (3, 2, 6), "scale": (8,)}  # on fsdp=4 x tensor=2


def build():
    return nnx.state(Small(nnx.Rngs(0)))


@pytest.fixture
def mesh():
    return make_mesh(MeshConfig(fsdp=4, tensor=2))


@pytest.fixture
def abstract():
    return nnx.split(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))[1]


def shards(state):
    return {name: state[name][...].addressable_shards[0].data.shape for name in SHARDS}


@pytest.mark.smoke
def test_jitted_init_makes_each_device_its_shard_only(mesh, abstract):
    state = jax.jit(build, out_shardings=state_shardings(abstract, mesh))()
    assert shards(state) == SHARDS
    assert len(state["table"][...].addressable_shards) == 8
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(build()), strict=True):
        assert jnp.array_equal(got, wanted)


def test_metadata_survives(mesh, abstract):
    state = jax.jit(build, out_shardings=state_shardings(abstract, mesh))()
    assert state["query"].get_metadata()["units"] == (3, 8, 4)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)


@pytest.mark.parametrize("optimizer", [optax.adamw(1e-3), optax.contrib.muon(1e-3)], ids=["adamw", "muon"])
def test_optimizer_state_lies_where_its_parameter_lies(mesh, abstract, optimizer):
    """Muon runs under multi_transform: its trees hold MaskedNode where a parameter is Adam's."""
    params = jax.jit(build, out_shardings=state_shardings(abstract, mesh))()
    shardings = state_shardings(jax.eval_shape(optimizer.init, abstract), mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.init(build()))

    seen = set()
    for path, variable in jax.tree.leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        if not isinstance(variable, nnx.Variable):
            assert variable.sharding.is_fully_replicated
        for array in jax.tree.leaves(variable) if isinstance(variable, nnx.Variable) else ():
            name = path[-1].key
            assert array.addressable_shards[0].data.shape == SHARDS[name]
            seen.add(name)
    assert seen == set(SHARDS)


def test_the_layout_survives_a_donated_step_without_compiling_again(mesh, abstract):
    optimizer, traces = optax.adamw(1e-3), []
    params = jax.jit(build, out_shardings=state_shardings(abstract, mesh))()
    shardings = state_shardings(jax.eval_shape(optimizer.init, abstract), mesh)
    moments = jax.jit(optimizer.init, out_shardings=shardings)(params)

    def step(params, moments):
        traces.append(None)
        gradients = jax.grad(lambda p: sum((x**2).sum() for x in jax.tree.leaves(p)))(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments

    jitted = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        params, moments = jitted(params, moments)
    assert shards(params) == SHARDS
    assert (len(traces), jitted._cache_size()) == (1, 1)


def test_a_checkpoint_restores_onto_another_mesh(mesh, abstract, tmp_path):
    state = jax.jit(build, out_shardings=state_shardings(abstract, mesh))()
    other = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = with_shardings(abstract, state_shardings(abstract, other))
        restored = checkpointer.restore(tmp_path / "state", target)
    assert shards(restored) == {"table": (12, 4), "query": (3, 4, 12), "scale": (8,)}
    assert jnp.array_equal(jax.device_get(restored["query"][...]), jax.device_get(state["query"][...]))


def test_bytes_add_up(mesh, abstract):
    rows = layout(abstract, mesh)
    assert [row.path for row in rows] == ["query", "scale", "table"]
    assert sum(row.bytes_total for row in rows) == 4 * (12 * 8 + 3 * 8 * 12 + 8)
    assert sum(row.bytes_per_device for row in rows) == 4 * (12 * 8 // 8 + 3 * 8 * 12 // 8 + 8)
    assert [row.path for row in rows if row.replicated] == ["scale"]
    assert rows[0].spec == PartitionSpec(None, "fsdp", "tensor")


def test_the_table_shows_axes_and_sums(mesh, abstract):
    out = io.StringIO()
    Console(file=out, width=120).print(layout_table(abstract, mesh))
    lines = {line.split("│")[1].strip(): line for line in out.getvalue().splitlines() if line.startswith("│")}
    assert "layers, embed, heads" in lines["query"]
    assert "-, fsdp, tensor" in lines["query"]
    assert "144 bytes" in lines["query"]
    assert "replicated" in lines["scale"]
    assert "224 bytes" in lines["total (1.6 kB in all)"]
    assert "32 bytes" in lines["of which replicated"]


def test_counts_and_keys_are_replicated(mesh):
    state = {"step": jnp.zeros((), jnp.int32), "key": jax.random.key(0), "raw": jnp.zeros(2, jnp.uint32)}
    state["seen"] = nnx.Variable(jnp.zeros(()))
    assert {s.spec for s in jax.tree.leaves(state_shardings(state, mesh))} == {PartitionSpec()}


def test_a_variable_without_axes_is_refused(mesh):
    with pytest.raises(ConfigError) as error:
        state_shardings({"block": {"bias": nnx.Param(jnp.zeros(4))}}, mesh)
    assert "block.bias: this variable of shape (4,) names no logical axes; build it with axes=" in str(error.value)


def test_a_bare_matrix_is_refused(mesh, abstract):
    """A pure dictionary has lost its axes: it must not be replicated in silence."""
    with pytest.raises(ConfigError, match=r"query: this array of shape \(3, 8, 12\) is not in an nnx.Variable"):
        state_shardings(nnx.to_pure_dict(abstract), mesh)


def test_an_error_names_the_parameter(abstract):
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8))
    with pytest.raises(ConfigError, match=r"^query: dimension 2 \(heads\) has size 12, in 4 pieces of 3"):
        state_shardings(abstract, mesh)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec(None, "fsdp")], ids=["replicated", "split"])
@pytest.mark.parametrize("where", ["one device", "the mesh"])
def test_donating_a_copy_leaves_the_array(mesh, spec, where):
    there = NamedSharding(mesh, spec)
    array = jnp.ones((2, 16)) if where == "one device" else jax.device_put(jnp.ones((2, 16)), there)
    with use(mesh, DEFAULT_RULES):
        copy = copy_to(array, there)
        jax.jit(lambda x: x + 1, donate_argnums=0, out_shardings=there)(copy)
    assert copy.is_deleted()
    assert not array.is_deleted()
    assert copy.sharding == there
