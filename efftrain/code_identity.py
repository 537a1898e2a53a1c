"""Which code a result was made by, so that a result of other code is never taken for one of this code.

A commit does not say it: a dirty tree is not one state, and a rule that a script defines stands in no commit of the
package at all. What is compared are digests of source files.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import efftrain
from efftrain.class_names import SCRIPT_PREFIX
from efftrain.errors import ConfigError

_PACKAGE = Path(efftrain.__file__).parent


def code_identity(*values: Any, rooms: Iterable[str] = ()) -> dict[str, str]:
    """The code that decides what becomes of a configuration.

    Args:
      values: dataclasses, functions, classes, modules, and lists, tuples and dictionaries of them, at any depth. The
        modules that define them count, those of base classes too, and what these import from modules that are neither
        installed nor of the standard library.
      rooms: the parts of the package that take part, folders or files: ``("data", "compress/text")``. Those that define
        one of the values are added. All of it by default.

    Returns:
      Digests of source: under "efftrain" the package's version and the rooms; under the name of its file or module
      each module outside of the package.

    Raises:
      ConfigError: a class was defined where Python keeps no source (at a prompt).
    """
    if rooms := set(rooms):
        owners = {owner for value in values for owner in _owners(value)}
        rooms |= {owner.split(".")[1] for owner in owners if _is_own(owner) and "." in owner}
    return {"efftrain": package_identity(tuple(sorted(rooms)))} | {
        name: _digest(contents) for name, contents in _sources(values).items()
    }


def own_sources(*values: Any) -> dict[str, bytes]:
    """The source files outside of the package that decide what becomes of a configuration, to be kept with a result.

    Args:
      values: as for ``code_identity``.

    Returns:
      File name -> content: ``mine.py``, ``layers.blocks.py`` for the module ``layers.blocks``; of several files with
      one name ``mine.py``, ``mine-2.py``, ...

    Raises:
      ConfigError: as for ``code_identity``.
    """
    return {
        f"{name.removesuffix('.py')}{f'-{number}' if number > 1 else ''}.py": content
        for name, contents in _sources(values).items()
        for number, content in enumerate(contents, start=1)
    }


def changed_code(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """The names in which two identities differ, for a message: ``efftrain, essays.py``; None where they are equal.

    Args:
      before: None where none was written, as by an earlier version.
      now: of the code that runs.
    """
    before = before or {}
    return ", ".join(sorted(name for name in {*before, *now} if before.get(name) != now.get(name))) or None


def modules_outside(names: Iterable[str]) -> list[types.ModuleType]:
    """The modules of these names that are neither of this package nor of Python, and those that they import from files
    that are not installed; a module comes after what it imports."""
    found: dict[str, types.ModuleType] = {}
    for name in names:
        _follow(name, found)
    return list(found.values())


def defined_outside(module: types.ModuleType) -> bool:
    """Whether a module is a user's own file: neither of this package, nor installed, nor a command."""
    path = Path(getattr(module, "__file__", None) or "")
    return path.suffix == ".py" and not path.is_relative_to(_PACKAGE) and not _is_installed(module)


@functools.cache
def package_identity(rooms: tuple[str, ...] = ()) -> str:
    """Version and digest of the source files of some rooms, or of the whole package.

    Raises:
      ValueError: there is no such room.
    """
    found = {room: [*(_PACKAGE / room).rglob("*.py"), *_PACKAGE.glob(f"{room}.py")] for room in rooms or (".",)}
    if empty := [room for room, files in found.items() if not files]:
        raise ValueError(f"the package has no room {empty[0]!r}")
    paths = sorted({path for files in found.values() for path in files})
    contents = (f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes() for path in paths)
    return f"{efftrain.__version__} {_digest(contents)}"


def _sources(values: Iterable[Any]) -> dict[str, list[bytes]]:
    """By name of script or module; the scripts of two runs may have one name."""
    found: dict[str, set[bytes]] = {}
    for module in modules_outside({owner for value in values for owner in _owners(value)}):
        found.setdefault(_name(module), set()).add(_source(module))
    return {name: sorted(found[name]) for name in sorted(found)}


def _owners(value: Any) -> Iterator[str]:
    """Names of the modules that define what a value is made of."""
    if isinstance(value, types.ModuleType):
        yield value.__name__
    elif isinstance(value, type):
        yield from (cls.__module__ for cls in value.__mro__)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _owners(item)
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _owners(item)
    elif isinstance(value, functools.partial):
        yield from _owners((value.func, value.args, value.keywords))
    elif isinstance(value, types.MethodType):
        yield from _owners((value.__func__, value.__self__))
    elif isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__"):  # what jax.jit returns is no function
        yield value.__module__
        yield from _owners(getattr(value, "__wrapped__", ()))
    elif dataclasses.is_dataclass(value):
        yield from _owners(type(value))
        for field in dataclasses.fields(value):
            yield from _owners(getattr(value, field.name))
    elif callable(value):
        yield from _owners(type(value))


def _follow(name: str, found: dict[str, types.ModuleType]) -> None:
    """Adds a module that defines something, unless it is of this package or of Python, and what it imports."""
    module = sys.modules.get(name)
    if module is None or name in found or _is_own(name) or _is_python(module):
        return
    found[name] = module  # at once, for modules that import each other
    for value in list(vars(module).values()):
        owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        imported = sys.modules.get(owner) if isinstance(owner, str) else None
        if imported is not None and not _is_installed(imported):
            _follow(owner, found)
    found[name] = found.pop(name)  # last: after what it imports


def _is_own(name: str) -> bool:
    return name == "efftrain" or name.startswith("efftrain.")


def _is_python(module: types.ModuleType) -> bool:
    """Whether a module is of the standard library or built in."""
    return module.__name__.partition(".")[0] in sys.stdlib_module_names and module.__name__ != "__main__"


def _is_installed(module: types.ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    return path is None or any(Path(path).is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(folder) for folder in {*folders, *site.getsitepackages(), site.getusersitepackages()} if folder)


def _name(module: types.ModuleType) -> str:
    """A script has one name, however it was started or imported: ``config.to_json`` writes the same."""
    is_script = module.__spec__ is None or module.__name__.startswith((SCRIPT_PREFIX, "__mp_main__"))
    if is_script and getattr(module, "__file__", None):
        return Path(module.__file__).name
    return module.__spec__.name if module.__spec__ else module.__name__  # of ``python -m``, it is not __main__


def _source(module: types.ModuleType) -> bytes:
    path = getattr(module, "__file__", None)
    if path and Path(path).suffix in (".pyc", ".so", ".pyd"):
        spec = importlib.util.find_spec(module.__name__)
        path = spec.origin if spec else path
    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"a class or function of this configuration was defined in {module.__name__}, of which there is no "
            "source file; write it into a .py file, so that a change of it is noticed"
        )
    return Path(path).read_bytes()


def _digest(contents: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for content in contents:
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()
