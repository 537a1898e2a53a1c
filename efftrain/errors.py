"""Errors that the user can correct.

Each message is one sentence that names the field or the file and the remedy. A command prints it without a traceback
and exits with code 2 (see ``recipe.exit_cleanly``); everything else is a bug and keeps its traceback. So does every
script that imports efftrain, even while it creates its configurations: see ``_print_one_sentence``.
"""

import sys
import traceback
from types import TracebackType

EXIT_MISTAKE = 2
EXIT_CTRL_C = 130  # 128 + SIGINT, as in shells


class EfftrainError(Exception):
    """Base class of all errors that the user can correct."""


class ConfigError(EfftrainError):
    """A field of a configuration has an impossible value, alone or in combination with another field."""


class CorpusError(EfftrainError):
    """A corpus, or a file from which it is made, is missing, damaged, empty or unreadable."""


class ModelFileError(EfftrainError):
    """A file with a model or tokenizer of another project is missing, damaged or of a kind that is not supported."""


class RunError(EfftrainError):
    """A run directory or a checkpoint cannot be used for the requested purpose."""


class InUseError(EfftrainError):
    """Another process is changing what this one would change: a run, a corpus, a cache, a file of measurements."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. The message says what is kept and how to continue."""


def exit_code(error: BaseException) -> int | None:
    """Returns the exit code of a process that ends with this error after one sentence; None: print a traceback."""
    if isinstance(error, EfftrainError):
        return EXIT_MISTAKE
    return EXIT_CTRL_C if isinstance(error, Interrupted) else None


_previous_hook = sys.excepthook


def _print_one_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's ``excepthook``: prints an error that the user can correct as one sentence with the script's line.

    A recipe creates its configurations while it is imported, before anything of efftrain could catch their errors.
    """
    if (code := exit_code(error)) is None:
        return _previous_hook(kind, error, trace)
    from efftrain.progress import print_error

    script = getattr(sys.modules.get("__main__"), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == script]
    print_error(error, f" ({script}, line {lines[-1]})" if lines and code == EXIT_MISTAKE else "")
    raise SystemExit(code)


sys.excepthook = _print_one_sentence
