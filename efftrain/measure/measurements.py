"""Measurements that take long, kept as they are made, so that the same command continues where it was stopped."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from efftrain.code_identity import changed_code
from efftrain.config import difference, finite_json
from efftrain.errors import RunError
from efftrain.lock import Lock, beside
from efftrain.progress import console


class Measurements:
    """What was measured so far for a file that does not exist yet, beside it; ``remove`` when the file is written.

    Until then, the end of the ``with`` block or of this object, no other process can measure for the same file.

    Args:
      path: of the file.
      values: what the measurements depend on, as JSON; those of other values are not taken, and a sentence says so.
      code: ``code_identity`` of what measures; the same goes for it.

    Raises:
      InUseError: another process measures for this file.
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
        """What ``measure`` returned, now or before; JSON, with None for floats that are not finite."""
        if name not in self._cells:
            self._cells[name] = finite_json(measure())
            write_json(self._path, self.values | {"cells": self._cells})
        return self._cells[name]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._lock.release()


def _read(path: Path) -> dict[str, Any] | None:
    """What an earlier process kept; None where there is nothing, or a damaged file, which is then set aside."""
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
    """In what a result was made otherwise than it is made now: ``other code (efftrain)``; None where in nothing.

    Args:
      before: what a result was made from, as it was written; under "code" by which code.
      now: the same of what is asked for.
    """
    plain = [{name: value for name, value in origin.items() if name != "code"} for origin in (before, now)]
    if changed := difference(plain[0], json.loads(json.dumps(plain[1]))):
        return f"other options or inputs ({changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''})"
    code = changed_code(before.get("code"), now["code"])
    return code and f"other code (changed since: {code})"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all; floats that are not finite become null.

    Raises:
      RunError: it cannot be written.
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
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write {path} ({error.strerror}); free the disk and give the same command again"
        ) from error
