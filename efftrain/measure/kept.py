"""Measurements that take long, kept as they are made, so that the same command continues where it was stopped."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efftrain.errors import RunError


class Kept:
    """What was measured so far for a file that does not exist yet, beside it; ``remove`` when the file is written.

    Args:
      path: of the file.
      values: what the measurements depend on: those of other values are not taken.
    """

    def __init__(self, path: Path, values: dict[str, Any]):
        self.values, self._path = values, path.with_name(f".{path.name}.incomplete")
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._cells = before.get("cells", {}) if {**before, "cells": None} == {**values, "cells": None} else {}

    def cell(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returned, now or before; JSON."""
        if name not in self._cells:
            self._cells[name] = measure()
            write_json(self._path, self.values | {"cells": self._cells})
        return self._cells[name]

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Raises:
      RunError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path} ({error.strerror}); free the disk and give the same command again"
        ) from error
