"""One clear error where a run cannot be written to the file system."""

import contextlib
from collections.abc import Generator
from pathlib import Path

from efftrain.errors import RunError


@contextlib.contextmanager
def writing(path: Path) -> Generator[None]:
    """Turns a file system error in the context into a ``RunError`` that names this path."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror or error}); choose another --out, or free disk space and give "
            "the same command again"
        ) from error
