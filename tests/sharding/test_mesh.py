"""The mesh multiplies to the devices, or says how to mend it."""

import jax
import pytest

from efftrain.errors import ConfigError
from efftrain.sharding.mesh import AXES, MeshConfig, make_mesh


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
