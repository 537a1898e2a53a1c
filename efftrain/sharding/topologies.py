"""Slices of accelerators by name, for which a program can be compiled ahead of time without having them."""

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from efftrain.errors import ConfigError
from efftrain.sharding.chips import Chip, find_chip

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How the slices of one TPU generation are described.

    Attributes:
      dims: number of dimensions of its torus.
      per_host: number of chips of a host along each dimension.
      example: name of a slice that exists.
      wraps: a dimension closes to a ring if its size is a multiple of this.
      options: options of XLA's topology description, where its defaults differ from what a TPU VM shows.
    """

    dims: int
    per_host: tuple[int, ...]
    example: str
    wraps: int
    options: tuple[tuple[str, Any], ...] = ()


# wraps: jax-ml.github.io/scaling-book, "TPU networking". A v4 chip is one device only in megacore mode, the mode of
# TPU VMs; by default XLA shows its two cores.
GENERATIONS = {
    "v4": Generation(
        dims=3, per_host=(2, 2, 1), example="v4:2x2x4", wraps=4, options=(("chip_config_name", "megacore"),)
    ),
    "v5e": Generation(dims=2, per_host=(2, 2), example="v5e:8x8", wraps=16),
    "v5p": Generation(dims=3, per_host=(2, 2, 1), example="v5p:2x2x2", wraps=4),
    "v6e": Generation(dims=2, per_host=(2, 2), example="v6e:4x4", wraps=16),
}
_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v5": "v5p", "v6lite": "v6e"}


@dataclass(frozen=True, kw_only=True)
class Topology:
    """A slice of accelerators.

    Attributes:
      name: name such as ``v5e:8x8``.
      devices: descriptions of its chips, to make a mesh of and compile for, not to run on.
      chip: peak figures of one chip. None: for ``cpu``.
      shape: shape of the torus; () if there is none.
      wraps: for each dimension, whether it closes to a ring.
    """

    name: str
    devices: "list[jax.Device]"
    chip: Chip | None
    shape: tuple[int, ...] = ()
    wraps: tuple[bool, ...] = ()


def find_topology(name: str) -> Topology:
    """Returns the slice of that name: ``GENERATION:AxB`` or ``AxBxC`` (TPU), or ``cpu:N`` for N fake devices here.

    Raises:
      ConfigError: the name is not known, libtpu is missing, or the program would be for a GPU.
    """
    kind, _, size = name.strip().lower().replace("tpu-", "").partition(":")
    kind = _ALIASES.get(kind, kind)
    if kind == "cpu":
        return _cpu(name, size)
    if kind in ("gpu", "cuda") or re.fullmatch(r"[abh]\d{3}(-\d+)?", kind):
        raise ConfigError(
            f"--topology {name}: XLA compiles for a GPU only where that GPU and jax's CUDA plugin are; run the recipe "
            "there, or compile for one of the TPU topologies"
        )
    if kind not in GENERATIONS:
        raise ConfigError(f"--topology {name} is not known; {_known()}")
    generation = GENERATIONS[kind]
    if not re.fullmatch(r"\d+(x\d+)*", size):
        raise ConfigError(f"--topology {name} has no shape such as {generation.example}; {_known()}")
    shape = tuple(int(n) for n in size.split("x"))
    if kind in ("v5e", "v6e") and len(shape) == 3 and shape[2] == 1:
        shape = shape[:2]
    if len(shape) != generation.dims or min(shape) < 1:
        raise ConfigError(
            f"--topology {name} has {len(shape)} dimensions and the torus of {kind} has {generation.dims}; "
            f"use a shape such as {generation.example}"
        )
    devices = _describe(name, kind, shape, generation)
    return Topology(
        name=f"{kind}:{'x'.join(map(str, shape))}",
        devices=devices,
        chip=find_chip(devices[0].device_kind),
        shape=shape,
        wraps=tuple(n % generation.wraps == 0 for n in shape),
    )


def _describe(name: str, kind: str, shape: tuple[int, ...], generation: Generation) -> "list[jax.Device]":
    try:
        import libtpu  # noqa: F401, JAX finds it by itself; here it is only asked for
    except ImportError as error:
        raise ConfigError(f"--topology {name} needs libtpu; install it with: pip install 'efftrain[aot]'") from error
    # No TPU is attached that could be asked for its name over the network, or that two processes could compete for.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    whole = all(n % host == 0 for n, host in zip(shape, generation.per_host, strict=True))
    smaller = [min(n, host) for n, host in zip(shape, generation.per_host, strict=True)]  # a slice of part of a host
    options = dict(generation.options) | ({} if whole else {"chips_per_host_bounds": [*smaller, 1][:3]})
    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{'x'.join(map(str, shape))}", **options
            ).devices
        )
    except Exception as error:  # a RuntimeError of the plugin, whose class differs between versions of jax
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--topology {name} is not available ({reason}); {_known()}") from error


def _cpu(name: str, size: str) -> Topology:
    import jax

    devices = jax.devices("cpu")
    if not size.isdigit() or int(size) < 1:
        raise ConfigError(f"--topology {name} has no number of devices; write it like cpu:8")
    if int(size) > len(devices):
        raise ConfigError(
            f"--topology {name}: JAX was started with {len(devices)} CPU devices; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={size}"
        )
    return Topology(name=f"cpu:{int(size)}", devices=devices[: int(size)], chip=None)


def _known() -> str:
    return f"known are {', '.join(f'{kind} ({g.example})' for kind, g in GENERATIONS.items())} and cpu:N"
