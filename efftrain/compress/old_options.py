"""Answers to the command ``efftrain compress RUN`` and its ``Compression`` as they were before there were subcommands.

They go with the next version.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efftrain.errors import ConfigError

COMMANDS = ("quantize", "prune", "structured")
FLAGS = {
    "--quantize": "--weights",
    "--slim": "--ratio",
    "--way": "--axis",
    "--by": "--metric",
    "--recover": "--recovery-tokens",
}
OTHERS = {"--activations", "--budget", "--cache", "--corpus", "--layers", "--method", "--out", "--rows", "--sparsity"}
STRUCTURED = {"--slim", "--way", "--by", "--search"}


@dataclass(frozen=True, kw_only=True, init=False)
class OldCompression:
    """What was ``Compression``: raises the error that names what has taken its place.

    Raises:
      ConfigError: always.
    """

    def __init__(self, **options: Any):
        now = "StructuredPrune" if options.get("slim") else "Prune" if options.get("sparsity") else "Quantize"
        raise ConfigError(
            f"Compression is now Quantize, Prune and StructuredPrune; use {now} of efftrain.compress.commands, and "
            "RecoveryTraining for training after pruning"
        )


def check_words(words: Sequence[str]) -> None:
    """Raises ConfigError with the present command if the words are those of the earlier one.

    Args:
      words: the arguments after ``efftrain compress``.
    """
    command, rest = (words[0], words[1:]) if words and words[0] in COMMANDS else (None, words)
    flags = {word.partition("=")[0] for word in rest}
    renamed = _renamed(rest)
    if command is None:
        first = next((word for word in rest if not word.startswith("-")), None)
        if not (flags & {*FLAGS, *OTHERS} or (first is not None and Path(first).is_dir())):
            return
        command = "structured" if flags & STRUCTURED else "prune" if "--sparsity" in flags else "quantize"
    elif renamed == [*rest]:
        return
    line = shlex.join(["efftrain", "compress", command, *renamed])
    raise ConfigError(f"the options of efftrain compress have changed; run: {line}")


def _renamed(words: Sequence[str]) -> list[str]:
    """The words with the present names of flags and methods."""
    found = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if flag == "--method" and value == "nearest":
            value = "rtn"
        is_method = before == "--method" and word == "nearest"
        found.append("rtn" if is_method else f"{FLAGS.get(flag, flag)}{equals}{value}")
    return found
