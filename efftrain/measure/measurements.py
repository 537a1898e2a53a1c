"""A store for long measurements, which lets an interrupted command continue where it was stopped."""

import contextlib
import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from efftrain.code_identity import changed_code
from efftrain.config import difference, finite_json
from efftrain.errors import RunError
from efftrain.lock import Lock, beside
from efftrain.progress import console


class Measurements:
    """Stores the measurements for a result file next to it, until the result file is complete.

    Call ``remove`` when the result file is written. Until then, or until the ``with`` block ends or this object is
    deleted, no other process can measure for the same file.

    Args:
      path: path of the result file.
      values: what the measurements depend on, as JSON. Stored measurements with other values are not used, and a
        message says so.
      code: ``code_identity`` of the code that measures; treated like ``values``.

    Raises:
      InUseError: another process is measuring for this file.
    """

    def __init__(self, path: Path, values: dict[str, Any], code: Mapping[str, str]):
        self.values, self._path = values | {"code": dict(code)}, path.with_name(f".{path.name}.incomplete")
        self._cells: dict[str, Any] = {}
        with _writing(path):
            self._lock = Lock(beside(path), path)
        before = _read(self._path)
        if before is None:
            return
        cells = before.pop("cells", {})
        if (reason := other_origin(before, self.values)) is None:
            self._cells = cells
        elif cells:
            console.print(f"{self._path} was measured with {reason}; measuring again", markup=False)

    def __enter__(self) -> "Measurements":
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """Returns the stored measurement of this name, or calls ``measure`` and stores its result.

        Args:
          name: name of the measurement.
          measure: returns a JSON value; floats that are not finite become None.
        """
        if name not in self._cells:
            self._cells[name] = finite_json(measure())
            write_json(self._path, self.values | {"cells": self._cells})
        return self._cells[name]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    """The measurements of an earlier process; None if there are none, or if the file is damaged and was set aside."""
    if not path.exists():
        return None
    try:
        before = json.loads(path.read_bytes().decode())
        if isinstance(before, dict) and isinstance(before.get("cells", {}), dict):
            return before
    except (ValueError, RecursionError):
        pass
    aside = path.with_name(f"{path.name}.damaged")
    os.replace(path, aside)
    console.print(f"warning: {path} is damaged and is now {aside}; measuring again", style="yellow", markup=False)
    return None


def other_origin(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Describes how the origin of a stored result differs from that of the requested one, for error messages.

    Args:
      before: what the stored result was made from, as it was written; its entry "code" is the code that made it.
      now: the same for the requested result.

    Returns:
      A phrase such as ``other code (changed since: ...)``, or None if nothing differs.
    """
    plain = [{name: value for name, value in origin.items() if name != "code"} for origin in (before, now)]
    if changed := difference(plain[0], json.loads(json.dumps(plain[1]))):
        return f"other options or inputs ({changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''})"
    code = changed_code(before.get("code"), now["code"])
    return code and f"other code (changed since: {code})"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically; floats that are not finite become null.

    Raises:
      RunError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.writing")
    with _writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(finite_json(values), indent=1, allow_nan=False) + "\n")
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _writing(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}); free disk space and give the same command again"
        ) from error
