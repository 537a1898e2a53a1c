"""``efftrain doctor``."""

import sys
from pathlib import Path

from rich.console import Console

from efftrain.cli.fake_devices import fake_devices as pretend_devices
from efftrain.errors import ConfigError
from efftrain.sharding.mesh import MeshConfig


def doctor(
    *,
    recipe: Path | None = None,
    config: str | None = None,
    mesh: MeshConfig = MeshConfig(),  # noqa: B008, a frozen value
    fake_devices: int | None = None,
) -> None:
    """Show versions, devices, the mesh, and how each parameter of a model is laid out on it.

    Args:
      recipe: a recipe script whose model is laid out; a small decoder by default.
      config: the name of one of its configurations; the first one by default.
      mesh: by default that of the recipe, or else all devices along fsdp.
      fake_devices: lay out for this many devices, which the CPU simulates.
    """
    if config is not None and recipe is None:
        raise ConfigError(f"--config {config} needs the recipe it belongs to; add --recipe PATH")
    if fake_devices is not None:
        pretend_devices(fake_devices)
    from efftrain.doctor import show

    show(Console(highlight=False, width=None if sys.stdout.isatty() else 120), recipe, config, mesh)
