"""The text of ``efftrain doctor``: what a machine has, and how a model would be laid out on it."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import psutil
from flax import nnx
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from efftrain.errors import ConfigError
from efftrain.models.config import ModelConfig, llama
from efftrain.models.decoder import abstract_decoder
from efftrain.recipe import HUGE_PAGES, JAX_CACHE, import_script
from efftrain.sharding.layout import layout_table
from efftrain.sharding.mesh import AXES, MeshConfig, make_mesh


def show(out: Console, recipe: Path | None, config: str | None, mesh: MeshConfig) -> None:
    """Prints versions, devices, the mesh, and the layout of a model's parameters.

    Args:
      out: the console to print to.
      recipe, config, mesh: see ``cli.doctor``.

    Raises:
      ConfigError: there is no such configuration, JAX cannot reach its devices, or the mesh does not fit.
    """
    out.print(f"efftrain {importlib.metadata.version('efftrain')}, Python {platform.python_version()}")
    out.print(f"{platform.platform()}, {os.cpu_count()} CPU cores, {_gib(_host_memory())} memory")
    out.print(f"huge pages for malloc: {_huge_pages()}")
    out.print(f"compiled programs: {os.environ.get(JAX_CACHE) or 'not kept'}\n")
    out.print(_versions_table())
    out.print(_devices_table(_devices()))

    chosen = _recipe_config(recipe, config) if recipe else None
    model, title = _model(chosen, recipe)
    device_mesh = make_mesh(_recipe_mesh(chosen) if mesh == MeshConfig() else mesh)
    out.print(f"mesh: {', '.join(f'{axis}={device_mesh.shape[axis]}' for axis in AXES)}\n")
    table = layout_table(_abstract_parameters(model), device_mesh)
    table.title, table.title_justify = title, "left"
    out.print(table)


def _devices() -> list[jax.Device]:
    try:
        return jax.devices()
    except RuntimeError as error:
        raise ConfigError(
            f"JAX cannot reach its devices ({error}); install the extra for this accelerator (efftrain[cuda] "
            "or efftrain[tpu]), or set JAX_PLATFORMS=cpu"
        ) from error


def _devices_table(devices: list[jax.Device]) -> Table:
    """One row for each kind of device."""
    table = Table("devices", "kind", "platform", "memory of each", title_justify="left")
    kinds: dict[tuple[str, str], list[jax.Device]] = {}
    for device in devices:
        kinds.setdefault((device.device_kind, device.platform), []).append(device)
    for (kind, name), same in kinds.items():
        memory = (same[0].memory_stats() or {}).get("bytes_limit")
        shown = _gib(memory) if memory else "that of the host" if name == "cpu" else "not reported"
        table.add_row(str(len(same)), kind, name, shown)
    return table


def _versions_table() -> Table:
    """One row for each requirement of efftrain: the installed version and the range that is tested."""
    table = Table("package", "installed", "tested with", "")
    for name, wanted in _requirements():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "-", str(wanted), "missing", style="red")
            continue
        fits = wanted.contains(installed, prereleases=True)
        table.add_row(name, installed, str(wanted), "" if fits else "not tested", style="" if fits else "red")
    return table


def _requirements() -> Iterator[tuple[str, Any]]:
    """Yields name and version specifier of each requirement of efftrain on this platform, without its extras."""
    for line in importlib.metadata.requires("efftrain") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield requirement.name, requirement.specifier
            if requirement.name == "jax":
                yield "jaxlib", requirement.specifier


def _huge_pages() -> str:
    """Returns whether recipes get huge pages; see ``recipe.restart_with_huge_pages``."""
    tunables = os.environ.get("GLIBC_TUNABLES")
    if tunables is not None:
        return "on" if HUGE_PAGES in tunables else f"off, because GLIBC_TUNABLES={tunables} was set"
    kernel = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not kernel.exists():
        return "not available on this system"
    if "[madvise]" in kernel.read_text():
        return f"recipes switch them on (GLIBC_TUNABLES={HUGE_PAGES})"
    return "on for every program" if "[always]" in kernel.read_text() else f"off, because {kernel} says never"


def _recipe_config(recipe: Path, name: str | None) -> Any:
    configs = getattr(import_script(recipe), "configs", None)
    if not configs:
        raise ConfigError(f"{recipe} has no table `configs`; give a recipe, such as recipes/dense.py")
    name = next(iter(configs)) if name is None else name
    if name not in configs:
        raise ConfigError(f"{recipe} has no configuration {name!r}; choose one of {', '.join(configs)}")
    if not hasattr(configs[name], "model"):
        raise ConfigError(f"{recipe}: configuration {name!r} has no field `model` to lay out")
    return configs[name]


def _recipe_mesh(config: Any) -> MeshConfig:
    for holder in (config, getattr(config, "training", None)):
        if isinstance(found := getattr(holder, "mesh", None), MeshConfig):
            return found
    return MeshConfig()


def _model(config: Any, recipe: Path | None) -> tuple[ModelConfig, str]:
    if config is not None:
        return config.model, f"parameters of {recipe}"

    small = llama(vocab_size=4096, d_model=384, n_layers=6, n_heads=8, d_ff=1024, max_length=256)
    return small, "parameters of a small decoder (choose another with --recipe)"


def _abstract_parameters(model: ModelConfig) -> Any:
    """Returns shapes and logical axes of the model's parameters; nothing is allocated."""
    return nnx.split(abstract_decoder(model), nnx.Param, ...)[1]


def _host_memory() -> int:
    return psutil.virtual_memory().total


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
