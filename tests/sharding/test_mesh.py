"""The mesh multiplies to the devices, or says how to mend it."""

import dataclasses

import jax
import numpy as np
import pytest

from efftrain.errors import ConfigError
from efftrain.sharding.mesh import AXES, MeshConfig, arrange, make_mesh
from efftrain.sharding.rules import constrain, use


def test_default_mesh_puts_every_device_on_fsdp():
    mesh = make_mesh(MeshConfig())
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"replica": 1, "fsdp": 8, "expert": 1, "tensor": 1, "context": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_open_axis_takes_what_is_left():
    assert MeshConfig(replica=2, tensor=2).fill(8).fsdp == 2
    assert MeshConfig(fsdp=2, context=-1).fill(8).context == 4


def test_mesh_over_some_of_the_devices():
    devices = jax.devices()[4:6]
    assert list(make_mesh(MeshConfig(), devices).devices.flat) == devices


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"fsdp": 3}, "fsdp=3 needs 3 devices and there are 8; change one axis, or set it to -1"),
        ({"fsdp": 4, "tensor": 4}, "fsdp=4 x tensor=4 needs 16 devices and there are 8"),
        ({"tensor": 3}, "no whole number for fsdp: 3 does not divide the 8 devices"),
    ],
)
def test_mesh_that_does_not_multiply_to_the_devices(sizes, sentence):
    with pytest.raises(ConfigError) as error:
        make_mesh(MeshConfig(**sizes))
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"tensor": 0}, "mesh.tensor is 0"),
        ({"expert": -2}, "mesh.expert is -2"),
        ({"tensor": -1}, "mesh.fsdp and mesh.tensor are both -1"),
    ],
)
def test_impossible_axis_size(sizes, sentence):
    with pytest.raises(ConfigError) as error:
        MeshConfig(**sizes)
    assert sentence in str(error.value)


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What the arrangement reads of a device; those of a slice need not stand together in the list."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


def slices_along(mesh_array, axis):
    """The slices that stand along one axis, everything else fixed."""
    lines = np.moveaxis(mesh_array, AXES.index(axis), -1).reshape(-1, mesh_array.shape[AXES.index(axis)])
    return {tuple(device.slice_index for device in line) for line in lines}


@pytest.mark.parametrize(
    ("config", "spans"),
    [
        (MeshConfig(replica=2, fsdp=2, tensor=2, slices=2), {"replica": {(0, 1)}}),
        (MeshConfig(replica=4, fsdp=1, context=2, slices=2), {"replica": {(0, 0, 1, 1)}}),
        (MeshConfig(fsdp=4, tensor=2, slices=2), {"fsdp": {(0, 0, 1, 1)}}),
        (MeshConfig(replica=2, fsdp=4, slices=4), {"replica": {(0, 2), (1, 3)}, "fsdp": {(0, 0, 1, 1), (2, 2, 3, 3)}}),
    ],
    ids=["replica", "replica within too", "fsdp", "both"],
)
@pytest.mark.parametrize("known", [True, False], ids=["slice_index", "in order"])
def test_only_replica_and_then_fsdp_span_slices(config, spans, known):
    per_slice = 8 // config.slices
    devices = [FakeDevice(i, i // per_slice) for i in range(8)]
    if known:
        found = arrange(config, sorted(devices, key=lambda device: device.id % per_slice))  # dealt round
    else:
        order = arrange(config, jax.devices())
        found = np.vectorize(lambda device: devices[device.id], otypes=[object])(order)
    assert found.shape == tuple(config.sizes().values())
    assert sorted(device.id for device in found.flat) == list(range(8))
    for axis in AXES:
        if axis in spans:
            assert slices_along(found, axis) == spans[axis]
        else:
            assert all(len(set(line)) == 1 for line in slices_along(found, axis)), axis


def test_mesh_of_two_slices_runs():
    mesh = make_mesh(MeshConfig(replica=2, tensor=2, slices=2))
    assert dict(mesh.shape) == {"replica": 2, "fsdp": 2, "expert": 1, "tensor": 2, "context": 1}
    assert [device.id // 4 for device in mesh.devices.flat] == [0] * 4 + [1] * 4
    with use(mesh):
        total = jax.jit(lambda x: constrain(x, "batch", None).sum())(np.arange(32.0).reshape(8, 4))
    assert total == 31 * 16


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (MeshConfig(replica=2, fsdp=2, tensor=2, slices=8), "8 slices do not divide replica=2 x fsdp=2; make replica"),
        (MeshConfig(fsdp=1, tensor=8, slices=2), "2 slices do not divide replica=1 x fsdp=1"),
    ],
)
def test_slices_that_would_cut_a_fast_axis(config, sentence):
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    assert sentence in str(error.value)


def test_tpu_slices_that_the_mesh_does_not_know_of():
    devices = [FakeDevice(i, i // 4, platform="tpu") for i in range(8)]
    with pytest.raises(ConfigError) as error:
        make_mesh(MeshConfig(), devices)
    assert str(error.value) == "mesh.slices is 1 and the TPU devices come in 2 slices; set it to 2"
    with pytest.raises(ConfigError) as error:
        MeshConfig(slices=0)
    assert str(error.value) == "mesh.slices is 0; give a positive number"
