"""A folder that appears when it is complete."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from efftrain.errors import RunError

MARKER = ".efftrain-export"


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Gives a folder to write into, ``OUT.incomplete``, which gets its name at the end if no error was raised.

    What a killed process left under that name is replaced.

    Args:
      out: the folder, which must not exist.

    Raises:
      RunError: it exists, or the disk is full or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists already; choose another --to")
    unfinished = out.with_name(f"{out.name}.incomplete")
    try:
        if (unfinished / MARKER).exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        (unfinished / MARKER).touch()
        yield unfinished
        (unfinished / MARKER).unlink()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free disk space or choose another --to") from error
