"""Names of configuration classes and fields in files, also those that earlier versions wrote.

A class of this package is written as ``Dense``, one of a script as ``recipe.py:Block``, and one of another package as
``module:Class``. Earlier versions wrote the package's own classes as ``efftrain.models.config:Dense``; both can be
read. So that a bare name is enough, no two configurations (keyword-only dataclasses) of the package share a name.
"""

import functools
import importlib
import re
import sys
import types
from pathlib import Path
from typing import Any

from efftrain.errors import ConfigError

SCRIPT_PREFIX = "efftrain_script_"  # start of the module names that ``recipe.import_script`` gives
# A name that earlier versions wrote -> the present name of the class.
RENAMED = {
    "Calibration": "DepthCalibration",
    "Compression": "OldCompression",
    "NofM": "SemiStructured",
    "Regrow": "RigL",
    "RepeatedLines": "LineDeduplication",
    "SplitByPackage": "SplitByGroup",
    "Zeros": "FrozenMask",
}
# Class, in its present name -> its fields: the name that earlier versions wrote -> the present name. It holds for
# subclasses too. A flag with an old name answers with the present one.
RENAMED_FIELDS: dict[str, dict[str, str]] = {
    "AtMost": {"limit": "threshold"},
    "Columns": {"package_column": "group_column"},
    "CorpusConfig": {"repeated_lines": "line_deduplication"},
    "Decontaminate": {"limit": "threshold", "held_out_limit": "held_out_threshold"},
    "Global": {"most": "max_sparsity"},
    "JsonLines": {"package_field": "group_field"},
    "OnPolicy": {"share": "fraction"},
    "Training": {"branch": "resume_from", "branch_schedule": "resume_schedule"},
    "TextFolder": {"package_by_folder": "group_by_folder"},
}

_PACKAGE = Path(__file__).parent
_OF_MODULE = re.compile(r"efftrain(?:\.\w+)*:(\w+)")
_DATACLASS = re.compile(r"^@(?:dataclasses\.)?dataclass(\(.*\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE)


def class_name(cls: type) -> str:
    """Returns the name under which a class is written."""
    module = sys.modules[cls.__module__]
    if module.__name__.startswith(f"{__package__}."):
        return current_name(f"{module.__name__}:{cls.__qualname__}")
    is_script = module.__spec__ is None or module.__name__.startswith(SCRIPT_PREFIX)
    file = getattr(module, "__file__", None)
    name = Path(file).name if is_script and file else module.__name__
    return f"{name}:{cls.__qualname__}"


def current_name(written: str) -> str:
    """Returns the name that ``class_name`` writes now for a name that an earlier version may have written."""
    found = _OF_MODULE.fullmatch(written)
    name = found[1] if found else written
    return RENAMED.get(name, name)


def find_class(written: str, script: types.ModuleType | None) -> type:
    """Returns the class of a name.

    Args:
      written: the name as this or an earlier version wrote it.
      script: the module with the classes that a script defined. None: there is no script.

    Raises:
      ConfigError: there is no such class, or the package has several.
    """
    module_name, _, qualname = current_name(written).rpartition(":")
    try:
        found: Any = (
            script if module_name.endswith(".py") else importlib.import_module(module_name or _module_of(qualname))
        )
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, LookupError) as error:
        raise ConfigError(
            f"config.json names {written}, which cannot be imported; install or restore the code that defines it"
        ) from error
    return found


def renamed_fields(cls: type) -> dict[str, str]:
    """Returns name that an earlier version wrote -> present name, for the renamed fields of a class and its bases."""
    return {
        old: new
        for base in reversed(cls.__mro__)
        for old, new in RENAMED_FIELDS.get(base.__name__, {}).items()
        if old not in getattr(cls, "__dataclass_fields__", {})
    }


@functools.cache
def package_dataclasses() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns name -> modules that define it, read from the sources: for keyword-only dataclasses, and for others."""
    found: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    for path in sorted(_PACKAGE.rglob("*.py")):
        module = ".".join((_PACKAGE.name, *path.relative_to(_PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        for options, name in _DATACLASS.findall(path.read_text(encoding="utf-8")):
            found["kw_only=True" not in options].setdefault(name, []).append(module)
    return found


def _module_of(name: str) -> str:
    modules = next((kind[name] for kind in package_dataclasses() if name in kind), [])
    if len(modules) != 1:
        raise LookupError(f"{name} is defined in {' and '.join(modules) or 'no module'}")
    return modules[0]
