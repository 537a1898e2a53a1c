"""FineWeb's own rules: Penedo et al. 2024 (arXiv 2406.17557), section 3.6.

datatrove is ``fineweb_quality_filter.py``, 0.10: it draws two of the lines elsewhere than the paper.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast, AtMost, Rule
from efftrain.data.rules.repetition import duplicates, n_visible
from efftrain.data.rules.spacy_words import check_spacy, with_words
from efftrain.data.rules.words import SENTENCE_ENDS


@dataclass(frozen=True, kw_only=True)
class EndedLines(AtLeast):
    """Menus and lists. Score: share of the lines that end in terminal punctuation, of any script.

    The paper rejects at 0.12 itself. datatrove: white space at the end of a line counts.
    """

    name: ClassVar[str] = "fineweb/ended_lines"
    limit: float = math.nextafter(0.12, 1)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        return sum(line[-1] in SENTENCE_ENDS for line in lines) / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class ShortLines(AtMost):
    """Menus and tables. Score: share of the lines that are shorter than 30 characters.

    The paper rejects at 0.67 itself. datatrove: 30 characters are short, too, and white space counts.
    """

    name: ClassVar[str] = "fineweb/short_lines"
    limit: float = math.nextafter(0.67, 0)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        longest = 30 if self.as_datatrove else 29
        return sum(len(line) <= longest for line in lines) / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class RepeatedLineChars(AtMost):
    """Boilerplate. Score: share of the characters, white space apart, in lines that repeat an earlier one.

    The paper rejects at 0.1 itself. datatrove: all characters but newlines, and 0.01.
    """

    name: ClassVar[str] = "fineweb/repeated_line_chars"
    limit: float = math.nextafter(0.1, 0)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            n_chars = text.n_chars - text.text.count("\n")
            return duplicates(_lines(text, True), False, len)[1] / max(n_chars, 1)
        return duplicates(text.lines, False, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class NewlinesPerWord(AtMost):
    """Lists. Score: newlines per word. Not in the paper; datatrove's, where punctuation is a word."""

    name: ClassVar[str] = "fineweb/newlines_per_word"
    limit: float = 0.3
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return text.text.count("\n") / max(with_words(text, self.as_datatrove).n_words, 1)


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """The rules above with the paper's thresholds; ``max_newlines_per_word`` is datatrove's, None leaves it out."""

    min_ended_lines: float = EndedLines.limit
    max_short_lines: float = ShortLines.limit
    max_repeated_line_chars: float = RepeatedLineChars.limit
    max_newlines_per_word: float | None = None
    as_datatrove: bool = False

    @classmethod
    def datatrove(cls) -> "FineWeb":
        """Scores and decides as datatrove's FineWebQualityFilter does; needs the extra ``datatrove``."""
        check_spacy()
        return cls(
            min_ended_lines=0.12,
            max_short_lines=0.67,
            max_repeated_line_chars=0.01,
            max_newlines_per_word=0.3,
            as_datatrove=True,
        )

    def rules(self) -> tuple[Rule, ...]:
        rules = (
            EndedLines(limit=self.min_ended_lines, as_datatrove=self.as_datatrove),
            ShortLines(limit=self.max_short_lines, as_datatrove=self.as_datatrove),
            RepeatedLineChars(limit=self.max_repeated_line_chars, as_datatrove=self.as_datatrove),
        )
        if self.max_newlines_per_word is None:
            return rules
        return *rules, NewlinesPerWord(limit=self.max_newlines_per_word, as_datatrove=self.as_datatrove)


def _lines(text: Text, as_datatrove: bool) -> list[str]:
    """The lines that are not blank."""
    return [line for line in text.text.split("\n") if line.strip()] if as_datatrove else text.lines
