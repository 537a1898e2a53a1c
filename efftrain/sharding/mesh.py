"""The device mesh: five named axes, all of size 1 on a laptop.

JAX is imported where a mesh is made, so that the command line can read ``MeshConfig`` without importing JAX.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from efftrain.errors import ConfigError

if TYPE_CHECKING:
    import jax
    import numpy as np

AXES = ("replica", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Number of devices along each mesh axis. One axis may be -1: it takes what the others leave.

    What each axis does to memory and traffic, and when to choose it: ``efftrain/sharding/README.md``.
    """

    replica: int = 1
    """Copies of the whole model. Costs one all-reduce of the gradients per step, so it can span slow links."""
    fsdp: int = -1
    """Splits parameters and batch. Parameters are gathered layer by layer: less memory, more traffic."""
    expert: int = 1
    """Splits the experts of a mixture and, everywhere else, the batch."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary. Communicates in every layer: keep it within fast links."""
    context: int = 1
    """Splits the sequence. Fetches the keys and values of the tokens before a device's own in every layer."""
    slices: int = 1
    """Groups of devices (TPU slices) with slow links between them. replica spans the groups, and fsdp if it must."""

    def __post_init__(self) -> None:
        sizes = self.sizes()
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis} is {size}; give a positive number, or -1 for the remaining devices")
        if (open_axes := [a for a, n in sizes.items() if n == -1]) and len(open_axes) > 1:
            raise ConfigError(f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; leave only one of them open")
        if self.slices < 1:
            raise ConfigError(f"mesh.slices is {self.slices}; give a positive number")

    def sizes(self) -> dict[str, int]:
        """Returns the number of devices along each of ``AXES``."""
        return {axis: getattr(self, axis) for axis in AXES}

    def fill(self, n_devices: int) -> "MeshConfig":
        """Returns the mesh with -1 replaced, so that the axes multiply to ``n_devices``.

        Raises:
          ConfigError: no such number exists.
        """
        sizes = self.sizes()
        fixed = math.prod(n for n in sizes.values() if n != -1)
        shape = " x ".join(f"{a}={n}" for a, n in sizes.items() if n != 1) or "all axes 1"
        for axis, size in sizes.items():
            if size == -1:
                if n_devices % fixed:
                    raise ConfigError(
                        f"mesh: {shape} leaves no whole number for {axis}: {fixed} does not divide the "
                        f"{n_devices} devices; choose the other axes so that {n_devices} is a multiple"
                    )
                return dataclasses.replace(self, **{axis: n_devices // fixed})
        if fixed != n_devices:
            raise ConfigError(
                f"mesh: {shape} needs {fixed} devices and there are {n_devices}; change one axis, or set "
                "it to -1 to take the remaining devices"
            )
        return self

    def across_slices(self) -> dict[str, int]:
        """Returns how many slices each axis spans, for a mesh without -1; the numbers multiply to ``slices``.

        Raises:
          ConfigError: replica and fsdp together cannot be divided into ``slices`` equal parts.
        """
        replica = math.gcd(self.replica, self.slices)
        fsdp = self.slices // replica
        if self.fsdp % fsdp:
            raise ConfigError(
                f"mesh: {self.slices} slices do not divide replica={self.replica} x fsdp={self.fsdp}; make "
                f"replica a multiple of {self.slices}, the other axes stay within a slice"
            )
        return dict.fromkeys(AXES, 1) | {"replica": replica, "fsdp": fsdp}


def make_mesh(config: MeshConfig, devices: "Sequence[jax.Device] | None" = None) -> "jax.sharding.Mesh":
    """Returns a mesh with the axes ``AXES``, on which the compiler places whatever is not constrained.

    Args:
      config: size of each axis.
      devices: devices of the mesh. None: all devices of all processes.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or the devices have not ``mesh.slices`` TPU
        slices.
    """
    import jax

    devices = list(jax.devices() if devices is None else devices)
    filled = config.fill(len(devices))
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    check_slices(config.slices, devices)
    if filled.slices == 1:
        return jax.make_mesh(tuple(filled.sizes().values()), AXES, axis_types=types, devices=devices)
    return jax.sharding.Mesh(arrange(filled, devices), AXES, axis_types=types)


def check_slices(slices: int, devices: "Sequence[jax.Device]") -> None:
    """Checks the number of TPU slices, because fast axes of a mesh would otherwise run over slow links.

    Raises:
      ConfigError: the devices come in several slices, and not in ``slices``.
    """
    if devices[0].platform != "tpu":
        return
    found = len({getattr(device, "slice_index", 0) for device in devices})
    if found > 1 and found != slices:
        raise ConfigError(f"mesh.slices is {slices} and the TPU devices come in {found} slices; set it to {found}")


def arrange(config: MeshConfig, devices: "Sequence[jax.Device]") -> "np.ndarray":
    """Arranges devices in the shape of the mesh, with those of a slice next to each other on every axis.

    Args:
      config: mesh without -1.
      devices: grouped by ``slice_index`` if they have one; otherwise into ``slices`` equal groups in their order, which
        with several hosts is that of the hosts.

    Returns:
      An array of devices; on an axis that spans slices, the slice is the slower index.
    """
    import numpy as np
    from jax.experimental import mesh_utils

    across = config.across_slices()
    within = {axis: size // across[axis] for axis, size in config.sizes().items()}
    shape, outer = tuple(within.values()), tuple(across.values())
    if len({getattr(device, "slice_index", None) for device in devices}) == config.slices:
        return mesh_utils.create_hybrid_device_mesh(shape, outer, devices)
    groups = np.asarray(devices, dtype=object).reshape(config.slices, -1)
    slices = np.stack([mesh_utils.create_device_mesh(shape, list(group)) for group in groups])
    # (outer axes, inner axes) -> outer 0, inner 0, outer 1, inner 1, ... -> one axis each
    pairs = slices.reshape(*outer, *shape).transpose([i for axis in range(len(AXES)) for i in (axis, axis + len(AXES))])
    return pairs.reshape(tuple(config.sizes().values()))
