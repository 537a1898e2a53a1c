"""The device mesh: five named axes, all of size 1 on a laptop.

JAX is imported where a mesh is made: the command line reads ``MeshConfig`` without paying for JAX.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from efftrain.errors import ConfigError

if TYPE_CHECKING:
    import jax

AXES = ("replica", "fsdp", "expert", "tensor", "context")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices stand along each mesh axis. One axis may be -1: it takes what the others leave."""

    replica: int = 1
    """Copies of the whole model. Costs one all-reduce of the gradients a step, so it can span slow links."""
    fsdp: int = -1
    """Splits parameters and batch. Parameters are gathered layer by layer: less memory, more traffic."""
    expert: int = 1
    """Splits the experts of a mixture and, everywhere else, the batch."""
    tensor: int = 1
    """Splits heads, feed-forward and vocabulary. Talks in every layer: keep it within fast links."""
    context: int = 1
    """Splits the sequence."""

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 1 and size != -1:
                raise ConfigError(f"mesh.{axis} is {size}; give a positive number, or -1 for what is left")
        if (open_axes := [a for a, n in dataclasses.asdict(self).items() if n == -1]) and len(open_axes) > 1:
            raise ConfigError(f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; leave only one of them open")

    def fill(self, n_devices: int) -> "MeshConfig":
        """The same mesh with -1 replaced, so that the axes multiply to ``n_devices``.

        Raises:
          ConfigError: no such number exists.
        """
        sizes = dataclasses.asdict(self)
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
                "it to -1 to take what is left"
            )
        return self


def make_mesh(config: MeshConfig, devices: "Sequence[jax.Device] | None" = None) -> "jax.sharding.Mesh":
    """A mesh over all devices with the axes ``AXES``, in which the compiler places what is not constrained.

    Args:
      config: the size of each axis.
      devices: by default all devices of all processes.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    import jax

    devices = list(jax.devices() if devices is None else devices)
    filled = config.fill(len(devices))
    return jax.make_mesh(
        tuple(getattr(filled, axis) for axis in AXES),
        AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
        devices=devices,
    )
