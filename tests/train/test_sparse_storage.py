"""Arrays with zeros on disk: what is read is what was saved, in fewer bytes, and damage is noticed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efftrain.errors import RunError
from efftrain.measure.scorecard.score import path_bytes
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.sparse_storage import expand, sparse_bytes, squeeze, stored_names

RNG = np.random.default_rng(0)


def sparse(shape: tuple[int, ...], density: float, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.where(RNG.random(shape) < density, RNG.normal(size=shape), 0), dtype)


def arrays() -> dict[str, jax.Array]:
    return {
        "half": sparse((3, 7, 11), 0.5),
        "few": sparse((64, 33), 0.05, jnp.bfloat16),
        "dense": sparse((16, 16), 1.0),
        "almost": sparse((16, 16), 0.98),
        "vector": jnp.zeros(64),
        "nothing": jnp.zeros((8, 8)),
        "signs": jnp.asarray(np.where(RNG.random((16, 16)) < 0.9, 0.0, -0.0), jnp.float32).at[0, 0].set(1.0),
        "levels": jnp.asarray(RNG.integers(-1, 2, (16, 16)), jnp.int8),
    }


def test_what_was_squeezed_comes_back_to_the_bit():
    flat = arrays()
    stored = squeeze(flat)
    assert {n for n in flat if n in stored} == {"dense", "almost", "vector", "nothing"}
    shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in flat.items()}
    assert stored_names(shapes, stored).keys() == stored.keys()
    for name, array in expand(stored, shapes).items():
        assert array.dtype == flat[name].dtype
        assert np.asarray(array).tobytes() == np.asarray(flat[name]).tobytes(), name
    n_bytes = sum(a.size * a.dtype.itemsize for n, a in stored.items() if n.startswith("half"))
    assert n_bytes == sparse_bytes(flat["half"]) < 0.6 * flat["half"].size * 4


def test_a_checkpoint_is_smaller_and_restores_onto_a_mesh(tmp_path):
    flat = {"params": {"w": sparse((256, 512), 0.25), "v": jnp.ones(8)}}
    for name in ("whole", "squeezed"):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, flat, None, None, squeezed=name == "squeezed")
    assert path_bytes(tmp_path / "squeezed") < 0.35 * 256 * 512 * 4
    mesh = jax.make_mesh((4, 2), ("a", "b"), devices=jax.devices()[:8])
    sharding = NamedSharding(mesh, PartitionSpec("a", "b"))
    whole = NamedSharding(mesh, PartitionSpec())
    wanted = {
        "w": jax.ShapeDtypeStruct((256, 512), jnp.float32, sharding=sharding),
        "v": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=whole),
    }
    with Checkpoints(tmp_path / "squeezed", read_only=True) as checkpoints:
        restored = checkpoints.restore_model(wanted)
    assert restored["w"].sharding == sharding
    np.testing.assert_array_equal(restored["w"], flat["params"]["w"])


def test_damage_and_other_shapes_are_noticed(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, {"params": {"w": sparse((64, 64), 0.5)}}, None, None, squeezed=True)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints, pytest.raises(RunError, match="of another model"):
        checkpoints.restore_model({"w": jax.ShapeDtypeStruct((32, 128), jnp.float32, sharding=here)})
    for path in (tmp_path / "c" / "1" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 4000:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
    with Checkpoints(tmp_path / "c", read_only=True) as checkpoints, pytest.raises(RunError, match="can be read"):
        checkpoints.restore_model({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=here)})
