"""The command line of recipes: turns a table of named configurations into a command, ``main(recipe_cli(configs))``."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import platform
import sys
import types
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from efftrain.class_names import SCRIPT_PREFIX, renamed_fields
from efftrain.errors import ConfigError, EfftrainError, Interrupted, exit_code
from efftrain.progress import console, print_error, write_in_any_locale

Config = TypeVar("Config")

# Makes glibc ask for huge pages. XLA on CPU allocates and frees its temporaries in each step, and the page faults cost
# a considerable part of a training step. The setting is read when a process starts, so a process cannot set its own.
HUGE_PAGES = "glibc.malloc.hugetlb=1"

JAX_CACHE = "JAX_COMPILATION_CACHE_DIR"

MODEL_OF = "model-of"  # the flag of every recipe that takes the model of a run

INTERRUPTED = "interrupted; the same command continues from what is complete, or starts again if nothing is"


def recipe_cli(configs: Mapping[str, Config], *, description: str | None = None) -> Config:
    """Reads the command line: the name of a configuration, then typed overrides of its fields.

    Args:
      configs: name -> complete configuration; the first one is the default.
      description: text of ``--help``. None: the docstring of the running script.

    Returns:
      The chosen configuration with the overrides applied. Ends the process with code 2 and one sentence if an argument
      is unknown or a value impossible, and with code 0 after ``--help``.
    """
    import tyro

    write_in_any_locale()
    main = sys.modules["__main__"]
    arguments = sys.argv[1:]
    first = next(iter(configs))
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else first
    if name not in configs:
        fail(ConfigError(f"there is no configuration {name!r}; choose one of {', '.join(configs)}"))
    text = description or main.__doc__ or ""
    help_text = f"{text}\n\nConfigurations: {', '.join(configs)} (default: {first}). Showing {name}."
    with exit_cleanly():
        default, arguments, how = _for_flags(configs[name], arguments[1:] if named else arguments)
    with exit_cleanly(), _hints(default, arguments):
        config = tyro.cli(
            type(default),
            default=default,
            args=arguments,
            description=f"{help_text}{how}",
            prog=f"python {sys.argv[0]} {name}",
            config=(tyro.conf.AvoidSubcommands,),
        )
    use_compilation_cache()
    restart_with_huge_pages()
    return config


def run_recipe(main, configs: Mapping[str, Config]) -> None:
    """Runs ``main(recipe_cli(configs))`` and prints errors as one sentence; every recipe ends with this call."""
    config = recipe_cli(configs)
    with exit_cleanly():
        main(config)


def _for_flags(config: Any, arguments: list[str]) -> tuple[Any, list[str], str]:
    """Gives a configuration with ``for_flags`` (``experiment.Experiment``) the model of the run that flags name.

    Returns:
      The configuration, the arguments without ``--model-of``, and what ``--help`` says about that flag.
    """
    if not hasattr(config, "for_flags"):
        return config, arguments, ""
    flags, rest, at = {}, [], 0
    while at < len(arguments):
        flag, equals, value = arguments[at].partition("=")
        words = 1 if equals or not flag.startswith("--") else 2
        name = flag.removeprefix("--").replace("_", "-")
        if flag.startswith("--") and (equals or at + 1 < len(arguments)):
            flags[name] = value if equals else arguments[at + 1]
        if name == MODEL_OF and flag.startswith("--"):
            if name not in flags:
                raise ConfigError(f"--{MODEL_OF} needs a run, such as --{MODEL_OF} runs/dense")
            at += words
            continue
        rest.append(arguments[at])
        at += 1
    starts = " and ".join(f"--{name}" for name in config.start_flags)
    how = (
        f"\n\n--{MODEL_OF} RUN takes the model of a run, such as an imported one, instead of the configuration's. "
        f"Without it, {starts} take the model of their run. Other flags change its fields."
    )
    return config.for_flags(flags), rest, how


@contextlib.contextmanager
def _hints(config: Any, arguments: list[str]) -> Generator[None]:
    """If the command line is rejected, prints for each unknown flag which flags exist in its place."""
    try:
        yield
    except SystemExit as stop:
        for flag in arguments if stop.code else []:
            if flag.startswith("--") and (hint := flag_hint(config, flag.split("=")[0])):
                console.print(hint, markup=False)
        raise


def flag_hint(config: Any, flag: str) -> str | None:
    """Returns what to use instead of a flag that names no field; None if it names one, or if its group is unknown too.

    Args:
      config: the dataclass whose fields are flags.
      flag: a flag such as ``--model.n-layers``, which follows from other fields.
    """
    *groups, name = flag.removeprefix("--").replace("-", "_").split(".")
    for group in groups:
        try:
            config = config[int(group)] if group.isdecimal() else getattr(config, group)
        except (AttributeError, LookupError, TypeError):
            return None
    if not dataclasses.is_dataclass(config):
        return None
    fields = [field.name for field in dataclasses.fields(config)]
    if name.removeprefix("no_") in fields or name in ("help", "h"):
        return None
    prefix = "--" + "".join(f"{group}." for group in groups)
    if now := renamed_fields(type(config)).get(name.removeprefix("no_")):
        return f"{flag} is now called {prefix}{now}".replace("_", "-")
    flags = ", ".join(prefix + field for field in fields).replace("_", "-")
    found = getattr(type(config), name, None)
    if isinstance(found, property):
        meaning = (found.__doc__ or "").strip().split("\n")[0].rstrip(".")
        return f"{flag} follows from other fields ({meaning}); set these: {flags}"
    return f"there is no flag {flag}; the flags are: {flags}"


@contextlib.contextmanager
def exit_cleanly() -> Generator[None]:
    """Turns an ``EfftrainError`` into one sentence and exit code 2, and Ctrl-C into one sentence and exit code 130.

    All other exceptions pass.
    """
    try:
        yield
    except EfftrainError as error:
        fail(error)
    except KeyboardInterrupt as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted(INTERRUPTED)
        print_error(interrupted)
        raise SystemExit(exit_code(interrupted)) from None


def fail(error: EfftrainError) -> None:
    print_error(error)
    raise SystemExit(exit_code(error))


def use_compilation_cache() -> None:
    """Keeps compiled programs for later processes in ``compilation_cache()``; call it before the first compilation.

    ``EFFTRAIN_CACHE=off`` prevents it; a folder that was given to JAX (``JAX_COMPILATION_CACHE_DIR``) is kept.
    """
    jax = sys.modules.get("jax")  # if JAX is not imported yet, it will read the environment
    if os.environ.get("EFFTRAIN_CACHE") == "off" or JAX_CACHE in os.environ:
        return
    if jax is not None and jax.config.jax_compilation_cache_dir:
        return
    folder = compilation_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # the home directory is not writable: everything works, but is compiled each time
    os.environ[JAX_CACHE] = str(folder)
    if jax is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def compilation_cache() -> Path:
    """Returns the folder of this user's compiled programs for this kind of machine.

    Programs for the CPU use its instructions, which may be missing in JAX's cache key, so that a home directory shared
    by different machines needs a folder for each kind.
    """
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else [platform.processor()]
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), lines[0])
    kind = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return base / "efftrain" / "xla" / f"{platform.machine()}-{kind}"


def restart_with_huge_pages() -> None:
    """Restarts this Python process with huge pages for malloc, if that helps and the user has not decided about it."""
    if not sys.platform.startswith("linux") or "GLIBC_TUNABLES" in os.environ:
        return
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[madvise]" not in setting.read_text():
        return
    os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def import_script(path: Path | str, name: str | None = None) -> types.ModuleType:
    """Imports a recipe or corpus script by its path, as a module named after the file.

    Scripts of the same name in several folders, such as the ``recipe.py`` of runs, become separate modules, because a
    class names its module, and the module leads to its source.

    Args:
      path: path of the script.
      name: name of the module, if another process has given it one. None: named after the file.

    Raises:
      ConfigError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"there is no script {path}; give the path of a .py file")
    name = name or _module_name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not named like a Python script; give the path of a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leaves the run directory unchanged
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def _module_name(path: Path) -> str:
    name = SCRIPT_PREFIX + path.stem
    other = getattr(sys.modules.get(name), "__file__", None)
    if other is not None and Path(other).resolve() != path.resolve():
        name += "_" + hashlib.blake2b(bytes(path.resolve()), digest_size=6).hexdigest()
    return name
