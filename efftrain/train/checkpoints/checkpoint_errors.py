"""Errors of reading and writing checkpoints: as sentences that say what to do, and on all processes alike."""

import contextlib
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from etils import epath

from efftrain.errors import RunError
from efftrain.sharding import hosts


@contextlib.contextmanager
def reading_errors(checkpoint: Path | epath.Path) -> Generator[None]:
    """Turns errors while reading a checkpoint, where there is no other to fall back to, into a ``RunError``.

    Args:
      checkpoint: folder of the checkpoint.

    Raises:
      RunError: the work in this context raised an exception.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # Orbax has no single class for a file that is missing, short or altered
        ignore_late_callbacks()
        raise RunError(
            f"checkpoint {checkpoint} is damaged or was removed ({first_line(error)}); use another one, or wait for "
            "the run to end"
        ) from error


@contextlib.contextmanager
def writing_errors(directory: Path | epath.Path) -> Generator[None]:
    """Turns file system errors, which Orbax wraps in several ways and often raises a save later, into ``RunError``s.

    Args:
      directory: folder of the checkpoints.

    Raises:
      RunError: a checkpoint could not be written.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        ignore_late_callbacks()
        raise RunError(
            f"cannot write a checkpoint to {directory} ({first_line(error)}); free disk space, then the same command "
            "continues from the newest complete checkpoint"
        ) from error


@contextlib.contextmanager
def all_or_none() -> Generator[None]:
    """Makes an error on one process an error on all, because they compute together what follows.

    Raises:
      ValueError: another process had an error; names the process.
    """
    problem = None
    try:
        yield
    except Exception as error:
        problem = error
    said = hosts.exchange("" if problem is None else first_line(problem))
    if problem is not None:
        raise problem
    for number, sentence in enumerate(said):
        if sentence:
            raise ValueError(f"process {number}: {sentence}")


def ignore_late_callbacks() -> None:
    """Hides tracebacks: when one file fails, Orbax closes its event loop, and every other file then prints one."""
    before = sys.unraisablehook

    def hook(report: Any) -> None:
        if str(report.exc_value) != "Event loop is closed":
            before(report)

    sys.unraisablehook = hook


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, at most 160 characters; without a message, its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
