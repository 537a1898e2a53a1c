"""Provides the rules that FineWeb introduced: Penedo et al. 2024 (arXiv 2406.17557), section 3.6.

With ``as_datatrove``, a rule scores like ``fineweb_quality_filter.py`` of datatrove 0.10, which differs from the paper
in two thresholds; the differences are described after "datatrove:".
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
    """Rejects menus and lists. Score: share of the lines that end in terminal punctuation of any script.

    As in the paper, a score of exactly 0.12 is rejected. datatrove: lines are not stripped, so that a line with
    trailing white space does not end in punctuation.
    """

    name: ClassVar[str] = "fineweb/ended_lines"
    threshold: float = math.nextafter(0.12, 1)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        return sum(line[-1] in SENTENCE_ENDS for line in lines) / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class ShortLines(AtMost):
    """Rejects menus and tables. Score: share of the lines that are shorter than 30 characters.

    As in the paper, a score of exactly 0.67 is rejected. datatrove: lines of 30 characters are also short, and
    surrounding white space counts.
    """

    name: ClassVar[str] = "fineweb/short_lines"
    threshold: float = math.nextafter(0.67, 0)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        longest = 30 if self.as_datatrove else 29
        return sum(len(line) <= longest for line in lines) / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class RepeatedLineChars(AtMost):
    """Rejects boilerplate. Score: share of the characters, except white space, in lines that repeat an earlier one.

    As in the paper, a score of exactly 0.1 is rejected. datatrove: all characters except newlines count, and the
    threshold is 0.01.
    """

    name: ClassVar[str] = "fineweb/repeated_line_chars"
    threshold: float = math.nextafter(0.1, 0)
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            n_chars = text.n_chars - text.text.count("\n")
            return duplicates(_lines(text, True), False, len)[1] / max(n_chars, 1)
        return duplicates(text.lines, False, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class NewlinesPerWord(AtMost):
    """Rejects lists. Score: number of newlines per word.

    The rule is not in the paper but in datatrove, where punctuation is a word.
    """

    name: ClassVar[str] = "fineweb/newlines_per_word"
    threshold: float = 0.3
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return text.text.count("\n") / max(with_words(text, self.as_datatrove).n_words, 1)


@dataclass(frozen=True, kw_only=True)
class FineWeb:
    """The rule set of FineWeb with the thresholds of the paper.

    Fields that begin with ``min_`` or ``max_`` are the thresholds of the rules of this module.
    ``max_newlines_per_word`` adds datatrove's rule ``NewlinesPerWord``; None omits it.
    """

    min_ended_lines: float = EndedLines.threshold
    max_short_lines: float = ShortLines.threshold
    max_repeated_line_chars: float = RepeatedLineChars.threshold
    max_newlines_per_word: float | None = None
    as_datatrove: bool = False

    @classmethod
    def datatrove(cls) -> "FineWeb":
        """Returns the configuration that scores and decides like datatrove's FineWebQualityFilter.

        Needs the extra ``datatrove``.
        """
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
            EndedLines(threshold=self.min_ended_lines, as_datatrove=self.as_datatrove),
            ShortLines(threshold=self.max_short_lines, as_datatrove=self.as_datatrove),
            RepeatedLineChars(threshold=self.max_repeated_line_chars, as_datatrove=self.as_datatrove),
        )
        if self.max_newlines_per_word is None:
            return rules
        return *rules, NewlinesPerWord(threshold=self.max_newlines_per_word, as_datatrove=self.as_datatrove)


def _lines(text: Text, as_datatrove: bool) -> list[str]:
    """Returns the lines that are not blank; for datatrove they are not stripped."""
    return [line for line in text.text.split("\n") if line.strip()] if as_datatrove else text.lines
