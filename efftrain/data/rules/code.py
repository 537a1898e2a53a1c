"""Provides rules for source code, which reject files that are not worth training on.

Codex refers to Chen et al. 2021, section 3.1; The Stack (Kocetkov et al. 2022) and StarCoder kept its line lengths.
"""

import re
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast, AtMost, Rule


@dataclass(frozen=True, kw_only=True)
class TooShort(AtLeast):
    """Rejects empty package markers and one-line imports, which have no context to learn from.

    Score: number of characters that are not ASCII white space.
    """

    name: ClassVar[str] = "too_short"
    threshold: int = 64

    def score(self, text: Text) -> float:
        return float(text.n_chars - text.byte_counts[_SPACE].sum())


@dataclass(frozen=True, kw_only=True)
class TooLong(AtMost):
    """Rejects very large files: they are nearly always data or bundled output, and each outweighs a whole package.

    Score: number of bytes. Limit: 1 MB, as in The Stack.
    """

    name: ClassVar[str] = "too_long"
    threshold: int = 1_000_000

    def score(self, text: Text) -> float:
        return float(len(text.utf8))


@dataclass(frozen=True, kw_only=True)
class NonText(AtMost):
    """Rejects binary content in a file with the name of a text file.

    Score: share of control bytes other than tab, newlines and form feed. Limit: one in a thousand, so that a test file
    with an escape character in a string is kept.
    """

    name: ClassVar[str] = "non_text"
    threshold: float = 0.001

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_CONTROL].sum()) / max(len(text.utf8), 1)


@dataclass(frozen=True, kw_only=True)
class Generated(AtMost):
    """Rejects files whose first lines say that a program generated them; a model should learn from the generator.

    Score: 1 if the first lines contain a marker of generated code, otherwise 0.

    Attributes:
      threshold: highest score at which a text is kept.
      lines: number of lines that are searched; twelve, because the marker often follows a licence header.
    """

    name: ClassVar[str] = "generated"
    threshold: float = 0.5
    lines: int = 12

    def score(self, text: Text) -> float:
        head = "\n".join(text.text[:4000].split("\n", self.lines)[: self.lines])
        return float(_GENERATED.search(head) is not None)


@dataclass(frozen=True, kw_only=True)
class LongLine(AtMost):
    """Rejects minified code and embedded data. Score: characters of the longest line. Limit: 1,000, as in Codex."""

    name: ClassVar[str] = "long_line"
    threshold: int = 1000

    def score(self, text: Text) -> float:
        return float(int(text.line_lengths.max()))


@dataclass(frozen=True, kw_only=True)
class LongLines(AtMost):
    """Rejects files whose lines are long on average: minified code or records of data.

    Score: mean number of characters per line. Limit: 100, as in Codex.
    """

    name: ClassVar[str] = "long_lines"
    threshold: float = 100.0

    def score(self, text: Text) -> float:
        return float(text.line_lengths.mean())


@dataclass(frozen=True, kw_only=True)
class FewLetters(AtLeast):
    """Rejects files that are mostly numbers and punctuation.

    Score: share of letters among the bytes that are not white space; non-ASCII bytes count as letters. The Stack
    requires 25 % alphanumeric characters, which a table of numbers satisfies; counting letters alone rejects it.
    """

    name: ClassVar[str] = "few_letters"
    threshold: float = 0.4

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_LETTERS].sum()) / _n_visible(text)


@dataclass(frozen=True, kw_only=True)
class TableLike(AtMost):
    """Rejects tables of decimal or hexadecimal numbers in the form of code.

    Score: share of digits and commas among the bytes that are not white space. The threshold was chosen by reading
    rejected files of installed distributions, so that test files with many numbers are kept.
    """

    name: ClassVar[str] = "table_like"
    threshold: float = 0.35

    def score(self, text: Text) -> float:
        return float(text.byte_counts[_TABLE].sum()) / _n_visible(text)


@dataclass(frozen=True, kw_only=True)
class Code:
    """The rule set for source code: the rules of this module with their thresholds, the fastest ones first."""

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
