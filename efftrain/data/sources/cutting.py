"""Cuts a long text into documents while it is read."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from efftrain.errors import ConfigError

_MAX_BYTES = 16 << 20  # about three times as much is held in memory


@dataclass(frozen=True, kw_only=True)
class AtBlankLines:
    """Cuts a text into documents at blank lines, once the current document is long enough.

    Attributes:
      min_bytes: size in bytes from which a document ends at the next blank line.
      max_bytes: maximum size of a document in bytes. A larger one is cut before the line that does not fit, and a
        larger line between two of its characters; each part is a document.
    """

    min_bytes: int = 2000
    max_bytes: int = 1 << 20

    def __post_init__(self):
        _check_max_bytes("AtBlankLines", self.max_bytes)
        if not 0 <= self.min_bytes <= self.max_bytes:
            raise ConfigError(f"AtBlankLines.min_bytes is {self.min_bytes}; give 0 up to max_bytes ({self.max_bytes})")


@dataclass(frozen=True, kw_only=True)
class AtPattern:
    r"""Begins a document at each line in which a regular expression is found, such as ``^= [^=]`` or ``^Chapter \d+$``.

    The text before the first such line is a document too.

    Attributes:
      pattern: the regular expression, which is searched in each line without its newline. The empty pattern makes each
        line a document.
      max_bytes: maximum size of a document in bytes, see ``AtBlankLines``.
    """

    pattern: str
    max_bytes: int = 1 << 20

    def __post_init__(self):
        _check_max_bytes("AtPattern", self.max_bytes)
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ConfigError(
                f"AtPattern.pattern {self.pattern!r} is not a valid regular expression: {error}"
            ) from None


Cut = AtBlankLines | AtPattern


def cut(stream: BinaryIO, at: Cut, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yields (position, content) of the documents of a UTF-8 text that begin at a byte in [start, stop).

    Args:
      stream: positioned at ``start``.
      at: where the text is cut.
      start: the first byte of a document. The documents from there on do not depend on the text before it.
      stop: first byte after the range; None reads to the end.
    """
    begins_document = _beginning(at)
    held: list[bytes] = []
    begins, size = start, 0
    rest, at_line_start, after_blank = b"", True, False
    while chunk := rest + stream.readline(at.max_bytes - len(rest)):
        n_rest = 0 if chunk.endswith(b"\n") else _unfinished_character(chunk)
        if n_rest < len(chunk):  # otherwise the stream ends within a character
            chunk, rest = chunk[: len(chunk) - n_rest], chunk[len(chunk) - n_rest :]
        else:
            rest = b""
        begin = at_line_start and begins_document(chunk, size, after_blank)
        if size and (begin or size + len(chunk) > at.max_bytes):
            yield begins, b"".join(held)
            begins, size, held = begins + size, 0, []
            if stop is not None and begins >= stop:
                return
        held.append(chunk)
        size += len(chunk)
        after_blank = chunk.isspace()
        at_line_start = chunk.endswith(b"\n")
    if size:
        yield begins, b"".join(held)


def _beginning(at: Cut) -> Callable[[bytes, int, bool], bool]:
    """Returns a function (line, size of the document before it, whether a blank line precedes) -> begins a document."""
    if isinstance(at, AtBlankLines):
        return lambda line, size, after_blank: after_blank and size >= at.min_bytes and not line.isspace()
    found = re.compile(at.pattern).search
    return lambda line, size, after_blank: found(line.decode(errors="replace").rstrip("\r\n")) is not None


def _unfinished_character(data: bytes) -> int:
    """Returns the number of bytes of an incomplete character at the end of ``data`` in UTF-8."""
    for n in range(1, min(3, len(data)) + 1):
        byte = data[-n]
        if byte & 0xC0 != 0x80:  # a character begins here
            return n if n < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
    return 0


def _check_max_bytes(name: str, max_bytes: int) -> None:
    if not 4 <= max_bytes <= _MAX_BYTES:  # a character has up to 4 bytes
        raise ConfigError(f"{name}.max_bytes is {max_bytes}; give 4 to {_MAX_BYTES:,}")
