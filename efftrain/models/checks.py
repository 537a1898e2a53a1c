"""Checks of the fields of configurations."""

from typing import Any, get_args

from efftrain.errors import ConfigError


def positive(name: str, value: int) -> None:
    """Raises ``ConfigError`` for a number below 1."""
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")


def one_of(name: str, value: Any, choices: Any) -> None:
    """Raises ``ConfigError`` if the value is not one of the strings of the ``Literal`` ``choices``."""
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(map(repr, get_args(choices)))}")
