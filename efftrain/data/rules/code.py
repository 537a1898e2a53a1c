"""Rules for source code. Each says why a text is not worth training on, and how clearly.

Codex is Chen et al. 2021, section 3.1; The Stack (Kocetkov et al. 2022) and StarCoder kept its line lengths.
"""

import re
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast, AtMost, Rule


@dataclass(frozen=True, kw_only=True)
class TooShort(AtLeast):
    """Empty package markers and one-line imports: no context to learn from.

    Score: characters that are not ASCII space.
    """

    name: ClassVar[str] = "too_short"
    limit: int = 64

    def score(self, text: Text) -> float:
        return float(text.n_chars - text.byte_counts[_SPACE].sum())


@dataclass(frozen=True, kw_only=True)
class TooLong(AtMost):
    """Nearly always data or bundled output, and one such file outweighs a package. Score: bytes.

    Limit: The Stack, 1 MB.
    """

    name: ClassVar[str] = "too_long"
    limit: int = 1_000_000

    def score(self, text: Text) -> float:
        return float(len(text.utf8))


@dataclass(frozen=True, kw_only=True)
class NonText(AtMost):
    """Binary content under a text name. Score: share of control bytes other than tab, newlines and form feed.

    Limit: one in a thousand, so that a test file with an escape character in a string stays.
    """

    name: ClassVar[str] = "non_text"
    limit: float = 0.001

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_CONTROL].sum()) / max(len(text.utf8), 1)


@dataclass(frozen=True, kw_only=True)
class Generated(AtMost):
    """Written by a program, which says so near the top: the model should learn from the generator instead.

    Score: 1 where a marker stands in the first lines. Twelve of them, because licence headers push the marker down.
    """

    name: ClassVar[str] = "generated"
    limit: float = 0.5
    lines: int = 12

    def score(self, text: Text) -> float:
        head = "\n".join(text.text[:4000].split("\n", self.lines)[: self.lines])
        return float(_GENERATED.search(head) is not None)


@dataclass(frozen=True, kw_only=True)
class LongLine(AtMost):
    """Minified code or embedded data. Score: characters of the longest line. Limit: Codex, 1,000."""

    name: ClassVar[str] = "long_line"
    limit: int = 1000

    def score(self, text: Text) -> float:
        return float(int(text.line_lengths.max()))


@dataclass(frozen=True, kw_only=True)
class LongLines(AtMost):
    """Lines that are long on average: minified, or records of data. Score: mean length.

    Limit: Codex, 100.
    """

    name: ClassVar[str] = "long_lines"
    limit: float = 100.0

    def score(self, text: Text) -> float:
        return float(text.line_lengths.mean())


@dataclass(frozen=True, kw_only=True)
class FewLetters(AtLeast):
    """Mostly numbers and punctuation. Score: share of letters in what is not space; non-ASCII bytes count as letters.

    The Stack asks for 25 % alphanumeric characters, which a table of numbers passes; letters alone are sharper.
    """

    name: ClassVar[str] = "few_letters"
    limit: float = 0.4

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_LETTERS].sum()) / _n_visible(text)


@dataclass(frozen=True, kw_only=True)
class TableLike(AtMost):
    """Tables of numbers or hexadecimal in code's clothing. Score: share of digits and commas in what is not space.

    Limit: set by reading the rejects among installed distributions; test files with many numbers begin below it.
    """

    name: ClassVar[str] = "table_like"
    limit: float = 0.35

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_TABLE].sum()) / _n_visible(text)


@dataclass(frozen=True, kw_only=True)
class Code:
    """The rules above with their limits, cheap ones first."""

    too_short: TooShort = TooShort()
    too_long: TooLong = TooLong()
    generated: Generated = Generated()
    non_text: NonText = NonText()
    long_line: LongLine = LongLine()
    long_lines: LongLines = LongLines()
    table_like: TableLike = TableLike()
    few_letters: FewLetters = FewLetters()

    def rules(self) -> tuple[Rule, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def _n_visible(text: Text) -> int:
    return max(len(text.utf8) - int(text.byte_counts[_SPACE].sum()), 1)


def _bytes(characters: bytes) -> np.ndarray:
    return np.frombuffer(characters, np.uint8)


_SPACE = _bytes(b" \t\n\r\f\v")
_CONTROL = _bytes(bytes(c for c in [*range(32), 127] if c not in b"\t\n\r\f"))
_LETTERS = _bytes(bytes(c for c in range(256) if c >= 128 or chr(c).isalpha()))
_TABLE = _bytes(b"0123456789,")

_GENERATED = re.compile(
    r"""
    @generated\b
    | \bdo\s+not\s+(edit|modify|change)\b (?!\s+this\s+line)      # version stamps forbid a line, not the file
    | \b(auto|machine)[- ]?generated\b
    | \bautomatically\s+generated\b
    | \bgenerated\s+(automatically|by\s+the\s+protocol\s+buffer|with\s+protoc)
    | \bgenerated\s+from\s+\S+\.(proto|td|g4|json|xml|ya?ml|in)\b
    | \b(code|file|module|script|source|class|parser|lexer)\s+(is\s+|was\s+|has\s+been\s+)?
      generated\s+(by|from|with|using)\b
    | ^\s*(\#|//|\'\'\'|\"\"\")\s*generated\s+(by|from|with|using)\b
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
