"""A first set of rules for source code. Each says why a text is not worth training on, and how clearly.

Codex is Chen et al. 2021, section 3.1; The Stack (Kocetkov et al. 2022) and StarCoder kept its line lengths.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from efftrain.data.documents import Text, Verdict


class Rule(Protocol):
    """A frozen dataclass whose fields are its thresholds."""

    def __call__(self, text: Text) -> Verdict: ...


@dataclass(frozen=True, kw_only=True)
class TooShort:
    """Empty package markers and one-line imports: no context to learn from.

    Score: characters that are not space.
    """

    limit: int = 64

    def __call__(self, text: Text) -> Verdict:
        # Only a text near the limit needs the exact count.
        score = text.n_chars if text.n_chars > 64 * self.limit else len("".join(text.text.split()))
        return Verdict(keep=score >= self.limit, rule="too_short", score=float(score))


@dataclass(frozen=True, kw_only=True)
class TooLong:
    """Nearly always data or bundled output, and one such file outweighs a package. Score: bytes.

    Limit: The Stack, 1 MB.
    """

    limit: int = 1_000_000

    def __call__(self, text: Text) -> Verdict:
        score = len(text.utf8)
        return Verdict(keep=score <= self.limit, rule="too_long", score=float(score))


@dataclass(frozen=True, kw_only=True)
class NonText:
    """Binary content under a text name. Score: share of control bytes other than tab, newlines and form feed.

    Limit: one in a thousand, so that a test file with an escape character in a string stays.
    """

    limit: float = 0.001

    def __call__(self, text: Text) -> Verdict:
        score = float(text.byte_counts[_CONTROL].sum()) / max(len(text.utf8), 1)
        return Verdict(keep=score <= self.limit, rule="non_text", score=score)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Written by a program, which says so near the top: the model should learn from the generator instead.

    Score: 1 where a marker stands in the first lines. Twelve of them, because licence headers push the marker down.
    """

    lines: int = 12

    def __call__(self, text: Text) -> Verdict:
        head = "\n".join(text.text[:4000].split("\n", self.lines)[: self.lines])
        found = _GENERATED.search(head) is not None
        return Verdict(keep=not found, rule="generated", score=float(found))


@dataclass(frozen=True, kw_only=True)
class LongLine:
    """Minified code or embedded data. Score: characters of the longest line. Limit: Codex, 1,000."""

    limit: int = 1000

    def __call__(self, text: Text) -> Verdict:
        score = int(text.line_lengths.max())
        return Verdict(keep=score <= self.limit, rule="long_line", score=float(score))


@dataclass(frozen=True, kw_only=True)
class LongLines:
    """Lines that are long on average: minified, or records of data. Score: mean length.

    Limit: Codex, 100.
    """

    limit: float = 100.0

    def __call__(self, text: Text) -> Verdict:
        score = float(text.line_lengths.mean())
        return Verdict(keep=score <= self.limit, rule="long_lines", score=score)


@dataclass(frozen=True, kw_only=True)
class FewLetters:
    """Mostly numbers and punctuation. Score: share of letters in what is not space; non-ASCII bytes count as letters.

    The Stack asks for 25 % alphanumeric characters, which a table of numbers passes; letters alone are sharper.
    """

    limit: float = 0.4

    def __call__(self, text: Text) -> Verdict:
        score = float(text.byte_counts[_LETTERS].sum()) / _n_visible(text)
        return Verdict(keep=score >= self.limit, rule="few_letters", score=score)


@dataclass(frozen=True, kw_only=True)
class TableLike:
    """Tables of numbers or hexadecimal in code's clothing. Score: share of digits and commas in what is not space.

    Limit: set by reading the rejects among installed distributions; test files with many numbers begin below it.
    """

    limit: float = 0.35

    def __call__(self, text: Text) -> Verdict:
        score = float(text.byte_counts[_TABLE].sum()) / _n_visible(text)
        return Verdict(keep=score <= self.limit, rule="table_like", score=score)


def judge(rules: Sequence[Rule], text: Text) -> Verdict | None:
    """The verdict of the first rule that rejects the text, or None where all keep it.

    Put cheap rules first.
    """
    for rule in rules:
        verdict = rule(text)
        if not verdict.keep:
            return verdict
    return None


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

CODE_RULES: tuple[Rule, ...] = (
    TooShort(),
    TooLong(),
    Generated(),
    NonText(),
    LongLine(),
    LongLines(),
    TableLike(),
    FewLetters(),
)
