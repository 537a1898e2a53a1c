"""Errors of the file system where a run is written, as one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from efftrain.errors import RunError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an error of the file system within into a ``RunError`` that names this path."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror or error}); choose another --out, or free the disk and give the "
            "same command again"
        ) from error
