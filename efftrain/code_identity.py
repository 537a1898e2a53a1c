"""Identifies the code that made a result, so that a result of other code is never mistaken for one of this code.

Digests of source files are compared. A commit is not enough: a dirty tree has no commit of its own, and a rule that a
script defines is in no commit of the package.
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
    """Returns digests of the code that determines the result of a configuration.

    Args:
      values: dataclasses, functions, classes, modules, and lists, tuples and dictionaries of them, at any depth. The
        modules that define them (and their base classes) count, and the modules that these import if those are neither
        installed nor in the standard library.
      rooms: the parts of the package that count, folders or files: ``("data", "compress/text")``. Parts that define one
        of the values are added. Empty: the whole package.

    Returns:
      Digests of source code: under "efftrain" the package's version and the rooms; for each module outside the
      package, under the name of its file or module.

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
    """Returns the source files outside the package that determine a configuration's result, to store with that result.

    Args:
      values: as for ``code_identity``.

    Returns:
      File name -> content: ``mine.py``, or ``layers.blocks.py`` for the module ``layers.blocks``; several files with
      one name are ``mine.py``, ``mine-2.py``, ...

    Raises:
      ConfigError: as for ``code_identity``.
    """
    return {
        f"{name.removesuffix('.py')}{f'-{number}' if number > 1 else ''}.py": content
        for name, contents in _sources(values).items()
        for number, content in enumerate(contents, start=1)
    }


def changed_code(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str | None:
    """Returns the names in which two identities differ, for a message: ``efftrain, essays.py``; None if they are equal.

    Args:
      before: identity that was stored. None: none was written, as by an earlier version.
      now: identity of the running code.
    """
    before = before or {}
    return ", ".join(sorted(name for name in {*before, *now} if before.get(name) != now.get(name))) or None


def modules_outside(names: Iterable[str]) -> list[types.ModuleType]:
    """Returns the modules of these names that belong neither to this package nor to Python, with their own imports.

    Of the modules that these import, those that are not installed are added; a module comes after what it imports.
    """
    found: dict[str, types.ModuleType] = {}
    for name in names:
        _follow(name, found)
    return list(found.values())


def defined_outside(module: types.ModuleType) -> bool:
    """Returns whether a module is a user's own file: not in this package, not installed, and no command."""
    path = Path(getattr(module, "__file__", None) or "")
    return path.suffix == ".py" and not path.is_relative_to(_PACKAGE) and not _is_installed(module)


@functools.cache
def package_identity(rooms: tuple[str, ...] = ()) -> str:
    """Returns version and digest of the source files of some rooms (folders or files of the package), or of all.

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
    """Returns contents by name of script or module; the scripts of two runs may have the same name."""
    found: dict[str, set[bytes]] = {}
    for module in modules_outside({owner for value in values for owner in _owners(value)}):
        found.setdefault(_name(module), set()).add(_source(module))
    return {name: sorted(found[name]) for name in sorted(found)}


def _owners(value: Any) -> Iterator[str]:
    """Yields the names of the modules that define the parts of a value."""
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
    elif isinstance(value, types.FunctionType) or hasattr(value, "__wrapped__"):  # jax.jit returns no FunctionType
        yield value.__module__
        yield from _owners(getattr(value, "__wrapped__", ()))
    elif dataclasses.is_dataclass(value):
        yield from _owners(type(value))
        for field in dataclasses.fields(value):
            yield from _owners(getattr(value, field.name))
    elif callable(value):
        yield from _owners(type(value))


def _follow(name: str, found: dict[str, types.ModuleType]) -> None:
    """Adds a module and those that it imports, unless it belongs to this package or to Python."""
    module = sys.modules.get(name)
    if module is None or name in found or _is_own(name) or _is_python(module):
        return
    found[name] = module  # before its imports, because modules may import each other
    for value in list(vars(module).values()):
        owner = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        if not isinstance(owner, str):
            continue
        imported = sys.modules.get(owner)
        if imported is not None and not _is_installed(imported):
            _follow(owner, found)
    found[name] = found.pop(name)  # last: after what it imports


def _is_own(name: str) -> bool:
    return name == "efftrain" or name.startswith("efftrain.")


def _is_python(module: types.ModuleType) -> bool:
    """Whether a module belongs to the standard library or is built in."""
    return module.__name__.partition(".")[0] in sys.stdlib_module_names and module.__name__ != "__main__"


def _is_installed(module: types.ModuleType) -> bool:
    path = getattr(module, "__file__", None)
    return path is None or any(Path(path).is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple(Path(folder) for folder in {*folders, *site.getsitepackages(), site.getusersitepackages()} if folder)


def _name(module: types.ModuleType) -> str:
    """Returns one name for a script, however it was started or imported; ``config.to_json`` writes the same name."""
    is_script = module.__spec__ is None or module.__name__.startswith((SCRIPT_PREFIX, "__mp_main__"))
    file = getattr(module, "__file__", None)
    if is_script and file:
        return Path(file).name
    return module.__spec__.name if module.__spec__ else module.__name__  # with ``python -m``, the latter is __main__


def _source(module: types.ModuleType) -> bytes:
    path = getattr(module, "__file__", None)
    if path and Path(path).suffix in (".pyc", ".so", ".pyd"):
        spec = importlib.util.find_spec(module.__name__)
        path = spec.origin if spec else path
    if path is None or not Path(path).is_file():
        raise ConfigError(
            f"a class or function of this configuration was defined in {module.__name__}, which has no source "
            "file; define it in a .py file, so that changes of its code are noticed"
        )
    return Path(path).read_bytes()


def _digest(contents: Iterable[bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for content in contents:
        state.update(len(content).to_bytes(8, "little") + content)
    return state.hexdigest()
