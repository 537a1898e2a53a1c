"""Gopher's rules against repetition: Rae et al. 2021 (arXiv 2112.11446), table A1.

Implementations share the paper's thresholds and differ in what they count. Here a score is the share of characters,
white space apart, that lie in a repetition; each character counts once, and the first occurrence of what is repeated
does not, unless ``count_first`` (as Dolma and DCLM have it). datatrove (``gopher_repetition_filter.py``, 0.10) is
described at each rule.
"""

import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtMost, Rule
from efftrain.data.rules.spacy_words import check_spacy, with_words


@dataclass(frozen=True, kw_only=True)
class DuplicateLines(AtMost):
    """Score: share of the lines that repeat an earlier one. datatrove: an empty first or last line counts."""

    name: ClassVar[str] = "repetition/duplicate_lines"
    limit: float = 0.3
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        return duplicates(lines, self.count_first, len)[0] / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateParagraphs(AtMost):
    """Score: share of the paragraphs that repeat an earlier one. datatrove: a line of spaces ends no paragraph."""

    name: ClassVar[str] = "repetition/duplicate_paragraphs"
    limit: float = 0.3
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        paragraphs = _paragraphs(text, self.as_datatrove)
        return duplicates(paragraphs, self.count_first, len)[0] / max(len(paragraphs), 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateLineChars(AtMost):
    """Score: share of the characters that lie in repeated lines. datatrove: white space counts."""

    name: ClassVar[str] = "repetition/duplicate_line_chars"
    limit: float = 0.2
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            return duplicates(_lines(text, True), self.count_first, len)[1] / max(text.n_chars, 1)
        return duplicates(text.lines, self.count_first, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateParagraphChars(AtMost):
    """Score: share of the characters that lie in repeated paragraphs. datatrove: white space counts."""

    name: ClassVar[str] = "repetition/duplicate_paragraph_chars"
    limit: float = 0.2
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            return duplicates(_paragraphs(text, True), self.count_first, len)[1] / max(text.n_chars, 1)
        return duplicates(text.paragraphs, self.count_first, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class TopNgram(AtMost):
    """Score: share of the characters inside the most frequent n-gram of words; 0 where none occurs twice.

    All its occurrences count, the first too; of equally frequent n-grams the longest one. datatrove: the first one
    of them, also where it occurs once; its length with spaces times its count, over all characters. That exceeds 1
    where its occurrences overlap, and where words that no space parts are counted with one.
    """

    n: int
    as_datatrove: bool = False

    @property
    def name(self) -> str:
        return f"repetition/top_{self.n}_gram"

    def score(self, text: Text) -> float:
        text = with_words(text, self.as_datatrove)
        starts, groups, is_first = repeated_ngrams(text, self.n)
        if len(starts) == 0:
            once = len(" ".join(text.words[: self.n])) if self.as_datatrove and text.n_words >= self.n else 0
            return once / max(text.n_chars, 1)
        until = _chars_until(text)
        counts = np.bincount(groups)
        firsts = starts[is_first]
        lengths = until[firsts + self.n] - until[firsts]
        top = np.flatnonzero(counts == counts.max())
        if self.as_datatrove:
            chosen = top[firsts[top].argmin()]
            return float((lengths[chosen] + self.n - 1) * counts[chosen]) / text.n_chars
        chosen = top[lengths[top].argmax()]
        return _covered(starts[groups == chosen], self.n, until) / text.n_visible


@dataclass(frozen=True, kw_only=True)
class DuplicateNgrams(AtMost):
    """Score: share of the characters inside n-grams of words that occurred before.

    datatrove: goes through the text and after a repeated n-gram goes on with the word after it, so that n-grams which
    overlap it are not seen; n-grams are equal where their letters are; characters of words over all characters.
    """

    n: int
    count_first: bool = False
    as_datatrove: bool = False

    @property
    def name(self) -> str:
        return f"repetition/duplicate_{self.n}_grams"

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            return _repeated_chars(with_words(text, True).words, self.n) / max(text.n_chars, 1)
        starts, _, is_first = repeated_ngrams(text, self.n)
        if len(starts) == 0:
            return 0.0
        repeats = np.sort(starts if self.count_first else starts[~is_first])
        return _covered(repeats, self.n, _chars_until(text)) / text.n_visible


@dataclass(frozen=True, kw_only=True)
class GopherRepetition:
    """The rules above with the thresholds of table A1, in datatrove's order. Of n-grams: pairs (n, limit)."""

    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_chars: float = 0.2
    max_duplicate_lines: float = 0.3
    max_duplicate_line_chars: float = 0.2
    max_top_ngrams: tuple[tuple[int, float], ...] = ((2, 0.20), (3, 0.18), (4, 0.16))
    max_duplicate_ngrams: tuple[tuple[int, float], ...] = (
        (5, 0.15),
        (6, 0.14),
        (7, 0.13),
        (8, 0.12),
        (9, 0.11),
        (10, 0.10),
    )
    count_first: bool = False
    as_datatrove: bool = False

    @classmethod
    def datatrove(cls) -> "GopherRepetition":
        """Scores and decides as datatrove's GopherRepetitionFilter does; needs the extra ``datatrove``.

        One difference: an empty text is left to the rules that count words.
        """
        check_spacy()
        return cls(as_datatrove=True)

    def rules(self) -> tuple[Rule, ...]:
        how = {"count_first": self.count_first, "as_datatrove": self.as_datatrove}
        top = (TopNgram(n=n, limit=limit, as_datatrove=self.as_datatrove) for n, limit in self.max_top_ngrams)
        return (
            DuplicateParagraphs(limit=self.max_duplicate_paragraphs, **how),
            DuplicateParagraphChars(limit=self.max_duplicate_paragraph_chars, **how),
            DuplicateLines(limit=self.max_duplicate_lines, **how),
            DuplicateLineChars(limit=self.max_duplicate_line_chars, **how),
            *top,
            *(DuplicateNgrams(n=n, limit=limit, **how) for n, limit in self.max_duplicate_ngrams),
        )


def n_visible(segment: str) -> int:
    """Characters that are not white space."""
    return sum(map(len, segment.split()))


def duplicates(segments: list[str], count_first: bool, length) -> tuple[int, int]:
    """How many segments repeat another one, and their characters.

    Args:
      segments: lines or paragraphs.
      count_first: whether the first of equal segments counts, too.
      length: str -> characters that count.
    """
    counts = Counter(segments)
    if len(counts) == len(segments):
        return 0, 0
    repeats = {segment: n if count_first else n - 1 for segment, n in counts.items() if n > 1}
    return sum(repeats.values()), sum(n * length(segment) for segment, n in repeats.items())


def repeated_ngrams(text: Text, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The n-grams of words that occur more than once; n is at least 2.

    Returns:
      starts: (occurrences,) the number of the first word of each; ascending in a group.
      groups: (occurrences,) ascending from 0; equal n-grams, and only they, have equal numbers.
      is_first: (occurrences,) bool, True at the first of each group.

    An n-gram can only be repeated where its first n-1 words are, so each n looks at what is left of the one before:
    in ordinary text very little from n = 4 on. Numbers stand for words and groups exactly; nothing is hashed.
    """
    if "repeated n-grams" not in text.derived:
        chain = [(np.arange(text.n_words), text.word_ids, None)]
        # One more word, which occurs nowhere else, so that an n-gram that reaches over the end is not repeated.
        text.derived["repeated n-grams"] = chain, np.append(text.word_ids, len(text.vocabulary))
    chain, words = text.derived["repeated n-grams"]
    while len(chain) < n:
        starts, groups, _ = chain[-1]
        chain.append(_repeated(starts, groups * (len(text.vocabulary) + 1) + words[starts + len(chain)]))
    return chain[n - 1]


def _repeated(starts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keeps the starts whose key occurs more than once, equal keys side by side."""
    if len(starts) == 0:
        return starts, keys, np.zeros(0, bool)
    order = keys.argsort(kind="stable")
    keys = keys[order]
    as_before = np.zeros(len(keys) + 1, bool)
    as_before[1:-1] = keys[1:] == keys[:-1]
    kept = as_before[:-1] | as_before[1:]
    is_first = ~as_before[:-1][kept]
    return starts[order[kept]], is_first.cumsum() - 1, is_first


def _chars_until(text: Text) -> np.ndarray:
    """(words + 1,) the characters of all words before each one."""
    if "chars until" not in text.derived:
        lengths = text.word_lengths[text.word_ids]
        text.derived["chars until"] = np.concatenate(([0], lengths.cumsum()))
    return text.derived["chars until"]


def _covered(starts: np.ndarray, n: int, until: np.ndarray) -> int:
    """Characters of the words that lie in an n-gram which begins at one of ``starts`` (ascending)."""
    ends = np.minimum(starts + n, np.append(starts[1:], len(until)))
    return int((until[ends] - until[starts]).sum())


def _repeated_chars(words: list[str], n: int) -> int:
    """datatrove's ``find_all_duplicate``: characters of the repetitions that a reader finds who skips what he found."""
    seen, n_chars, start = set(), 0, 0
    while start <= len(words) - n:
        letters = "".join(words[start : start + n])
        if letters in seen:
            n_chars += len(letters)
            start += n
        else:
            seen.add(letters)
            start += 1
    return n_chars


def _lines(text: Text, as_datatrove: bool) -> list[str]:
    return _NEWLINES.split(text.text) if as_datatrove else text.lines


def _paragraphs(text: Text, as_datatrove: bool) -> list[str]:
    return _EMPTY_LINES.split(text.text.strip()) if as_datatrove else text.paragraphs


_NEWLINES = re.compile(r"\n+")
_EMPTY_LINES = re.compile(r"\n{2,}")
