"""Turns frozen dataclasses into JSON and back, so that a run directory can rebuild any model.

A choice between components is a union of dataclasses, so every object carries its type: ``{"type": "Class", "field":
value, ...}``, see ``class_names``. Fields at their default are written too (except ``LATER`` ones), so that a file
means the same after a default has changed. A float that is not finite is written as a string, such as "inf".
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efftrain.class_names import class_name, current_name, find_class, renamed_fields
from efftrain.errors import ConfigError

NOT_FINITE = ("inf", "-inf", "nan")
# Metadata of a field that was added after configurations had been written. At its default, which is what those
# configurations mean, it is not written, so that older files and the digests of what was made from them stay valid.
LATER = {"later": True}


def to_json(value: Any) -> Any:
    """Turns a (nested) dataclass into plain JSON values.

    Raises:
      ConfigError: a field holds something that JSON cannot represent (a function, say): make it a small dataclass.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": class_name(type(value))} | {
            f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value) if not _left_out(f, value)
        }
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(
        f"{value!r} cannot be written to config.json; wrap the choice in a frozen dataclass with a build method"
    )


def _left_out(field: dataclasses.Field, value: Any) -> bool:
    if not field.metadata.get("later"):
        return False
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return getattr(value, field.name) == default


def from_json(value: Any, *, script: types.ModuleType | None = None) -> Any:
    """Rebuilds what ``to_json`` wrote.

    Args:
      value: the JSON value.
      script: the module in which classes that a script defined are looked up.

    Raises:
      ConfigError: a class or a field is unknown to this version of the code.
    """
    return _decode(value, Any, script)


def _decode(value: Any, annotation: Any, script: types.ModuleType | None) -> Any:
    if isinstance(value, dict) and "type" in value:
        cls = find_class(value["type"], script)
        if not dataclasses.is_dataclass(cls):
            raise ConfigError(f"config.json names {value['type']}, which is not a dataclass")
        hints = typing.get_type_hints(cls)
        names = {f.name for f in dataclasses.fields(cls)}
        renamed = renamed_fields(cls)
        given = {renamed.get(k, k): v for k, v in value.items() if k != "type"}
        if unknown := sorted(given.keys() - names):
            raise ConfigError(
                f"{value['type']} has no field {unknown[0]!r}; it was written by another version of efftrain"
            )
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        if missing := [name for name in needed if name not in given]:
            raise ConfigError(
                f"{value['type']} lacks the field {missing[0]!r}; it was written by another version of efftrain"
            )
        return cls(**{k: _decode(v, hints[k], script) for k, v in given.items()})
    # Of a union, such as an optional field, the member that a JSON list or object can represent.
    kinds = [annotation, *typing.get_args(annotation)]
    if isinstance(value, dict):
        kind = next((k for k in kinds if typing.get_origin(k) is dict), Any)
        inner = typing.get_args(kind)[1] if kind is not Any else Any
        return {k: _decode(v, inner, script) for k, v in value.items()}
    if isinstance(value, list):
        kind = next((k for k in kinds if (typing.get_origin(k) or k) in (tuple, list)), Any)
        inner = [k for k in typing.get_args(kind) if k is not ...] or [Any]
        items = [_decode(v, inner[min(i, len(inner) - 1)], script) for i, v in enumerate(value)]
        return tuple(items) if (typing.get_origin(kind) or kind) is tuple else items
    if isinstance(value, str) and Path in kinds:
        return Path(value)
    return float(value) if isinstance(value, str) and value in NOT_FINITE and float in kinds else value


def _with_present_fields(value: dict[str, Any]) -> dict[str, Any]:
    try:
        renamed = renamed_fields(find_class(value["type"], None))
    except (AttributeError, ConfigError, KeyError, TypeError):  # no object, or one of a class that is not known here
        return value
    return {renamed.get(name, name): item for name, item in value.items()}


def finite_json(value: Any) -> Any:
    """Returns the JSON values with null for every float that is not finite, which JSON cannot represent."""
    if isinstance(value, Mapping):
        return {name: finite_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def digest(value: Any) -> str:
    """Returns a short stable fingerprint of a configuration (blake2b of its canonical JSON), 32 hex digits."""
    return json_digest(to_json(value))


def json_digest(value: Any) -> str:
    """As ``digest``, for a value that is JSON already."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Returns the fields in which two JSON values differ, as ``path: old -> new``, for error messages.

    Two names of the same class or field, written by different versions (``class_names``), are not a difference.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = _with_present_fields(old), _with_present_fields(new)
        keys = [*old, *(k for k in new if k not in old)]
        return [line for k in keys for line in difference(old.get(k), new.get(k), f"{path}.{k}" if path else str(k))]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            line for i, (a, b) in enumerate(zip(old, new, strict=True)) for line in difference(a, b, f"{path}[{i}]")
        ]
    if path.rpartition(".")[2] == "type" and isinstance(old, str) and isinstance(new, str):
        old, new = current_name(old), current_name(new)
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]
