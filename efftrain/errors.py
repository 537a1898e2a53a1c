"""Errors that the user can mend.

Each message is one sentence that names the field or the file and the remedy. A command prints it without a
traceback and exits with code 2 (see ``recipe.exit_cleanly``); everything else is a bug and keeps its traceback.
"""


class EfftrainError(Exception):
    """Base of all errors that the user can mend."""


class ConfigError(EfftrainError):
    """A field of a configuration is impossible, alone or with another field."""


class CorpusError(EfftrainError):
    """A corpus, or a file it is made of, is missing, damaged, empty or unreadable."""


class RunError(EfftrainError):
    """A run directory or a checkpoint cannot be used for what was asked."""


class InUseError(EfftrainError):
    """Another process is changing what this one would change: a run, a corpus, a cache, a file of measurements."""
