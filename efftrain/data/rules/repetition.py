"""Provides Gopher's rules against repetition: Rae et al. 2021 (arXiv 2112.11446), table A1.

Implementations share the thresholds of the paper and differ in what they count. Here, a score is a share of lines,
paragraphs or characters other than white space that are repetitions. Each character counts once, and the first
occurrence of a repeated part does not count unless ``count_first`` is set (as in Dolma and DCLM). With
``as_datatrove``, a rule scores like ``gopher_repetition_filter.py`` of datatrove 0.10; the differences are described
after "datatrove:".
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
    """Rejects repeated lines. Score: share of the lines that repeat an earlier one.

    datatrove: an empty first or last line counts.
    """

    name: ClassVar[str] = "repetition/duplicate_lines"
    threshold: float = 0.3
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        lines = _lines(text, self.as_datatrove)
        return duplicates(lines, self.count_first, len)[0] / max(len(lines), 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateParagraphs(AtMost):
    """Rejects repeated paragraphs. Score: share of the paragraphs that repeat an earlier one.

    datatrove: only empty lines separate paragraphs, not lines of spaces.
    """

    name: ClassVar[str] = "repetition/duplicate_paragraphs"
    threshold: float = 0.3
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        paragraphs = _paragraphs(text, self.as_datatrove)
        return duplicates(paragraphs, self.count_first, len)[0] / max(len(paragraphs), 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateLineChars(AtMost):
    """Rejects repeated lines. Score: share of the characters that are in repeated lines.

    datatrove: white space counts.
    """

    name: ClassVar[str] = "repetition/duplicate_line_chars"
    threshold: float = 0.2
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            return duplicates(_lines(text, True), self.count_first, len)[1] / max(text.n_chars, 1)
        return duplicates(text.lines, self.count_first, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class DuplicateParagraphChars(AtMost):
    """Rejects repeated paragraphs. Score: share of the characters that are in repeated paragraphs.

    datatrove: white space counts.
    """

    name: ClassVar[str] = "repetition/duplicate_paragraph_chars"
    threshold: float = 0.2
    count_first: bool = False
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        if self.as_datatrove:
            return duplicates(_paragraphs(text, True), self.count_first, len)[1] / max(text.n_chars, 1)
        return duplicates(text.paragraphs, self.count_first, n_visible)[1] / max(text.n_visible, 1)


@dataclass(frozen=True, kw_only=True)
class TopNgram(AtMost):
    """Rejects texts that repeat one phrase. Score: share of the characters in the most frequent n-gram of words.

    All occurrences of the n-gram count, including the first; among equally frequent n-grams the longest is used. The
    score is 0 if no n-gram occurs twice.

    datatrove: among equally frequent n-grams the first is used, even if it occurs only once. Its length with spaces is
    multiplied by its count and divided by the number of all characters. This can exceed 1 if occurrences overlap, or if
    words are counted with a space between them that the text does not have.
    """

    n: int
    as_datatrove: bool = False

    @property
    def name(self) -> str:  # ty: ignore[incompatible-property-override]  # read only, as every rule's name
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
    """Rejects repeated phrases. Score: share of the characters in n-grams of words that occurred before.

    datatrove: after a repeated n-gram, the search continues with the word after it, so that n-grams which overlap it
    are ignored. N-grams are equal if their concatenated words are equal. The characters of repeated words are divided
    by the number of all characters.
    """

    n: int
    count_first: bool = False
    as_datatrove: bool = False

    @property
    def name(self) -> str:  # ty: ignore[incompatible-property-override]  # read only, as every rule's name
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
    """The rule set of Gopher against repetition with the thresholds of table A1, in the order of datatrove.

    Fields that begin with ``max_`` are the thresholds of the rules of this module; those for n-grams are pairs (n,
    threshold).
    """

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
        """Returns the configuration that scores and decides like datatrove's GopherRepetitionFilter.

        Needs the extra ``datatrove``. The only difference is that an empty text is kept here, for rules that count
        words to reject.
        """
        check_spacy()
        return cls(as_datatrove=True)

    def rules(self) -> tuple[Rule, ...]:
        how = {"count_first": self.count_first, "as_datatrove": self.as_datatrove}
        top = (
            TopNgram(n=n, threshold=threshold, as_datatrove=self.as_datatrove) for n, threshold in self.max_top_ngrams
        )
        return (
            DuplicateParagraphs(threshold=self.max_duplicate_paragraphs, **how),
            DuplicateParagraphChars(threshold=self.max_duplicate_paragraph_chars, **how),
            DuplicateLines(threshold=self.max_duplicate_lines, **how),
            DuplicateLineChars(threshold=self.max_duplicate_line_chars, **how),
            *top,
            *(DuplicateNgrams(n=n, threshold=threshold, **how) for n, threshold in self.max_duplicate_ngrams),
        )


def n_visible(segment: str) -> int:
    """Returns the number of characters that are not white space."""
    return sum(map(len, segment.split()))


def duplicates(segments: list[str], count_first: bool, length) -> tuple[int, int]:
    """Returns the number of segments that repeat another one, and the number of their characters.

    Args:
      segments: lines or paragraphs.
      count_first: whether the first of several equal segments counts as well.
      length: function from a segment to the number of its characters that count.
    """
    counts = Counter(segments)
    if len(counts) == len(segments):
        return 0, 0
    repeats = {segment: n if count_first else n - 1 for segment, n in counts.items() if n > 1}
    return sum(repeats.values()), sum(n * length(segment) for segment, n in repeats.items())


def repeated_ngrams(text: Text, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the n-grams of words that occur more than once.

    An n-gram can only be repeated if its first n-1 words are repeated, so that each n examines only the repetitions of
    n-1, of which ordinary text has few from n = 4 on. Words and groups are numbered exactly; nothing is hashed.

    Args:
      text: the text.
      n: number of words, at least 2.

    Returns:
      starts: (occurrences,) index of the first word of each occurrence; ascending within a group.
      groups: (occurrences,) number of the group, ascending from 0; each distinct n-gram is a group.
      is_first: (occurrences,) bool, True for the first occurrence of each group.
    """
    if "repeated n-grams" not in text.derived:
        chain = [
            (np.arange(text.n_words), text.word_ids, np.zeros(0, bool))
        ]  # of single words, whose repetitions nobody asks for
        # A sentinel word that occurs nowhere else, so that an n-gram beyond the end is never a repetition.
        text.derived["repeated n-grams"] = chain, np.append(text.word_ids, len(text.vocabulary))
    chain, words = text.derived["repeated n-grams"]
    while len(chain) < n:
        starts, groups, _ = chain[-1]
        chain.append(_repeated(starts, groups * (len(text.vocabulary) + 1) + words[starts + len(chain)]))
    return chain[n - 1]


def _repeated(starts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keeps the starts whose key occurs more than once, grouped by key."""
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
    """Returns (words + 1,), the number of characters of all words before each word."""
    if "chars until" not in text.derived:
        lengths = text.word_lengths[text.word_ids]
        text.derived["chars until"] = np.concatenate(([0], lengths.cumsum()))
    return text.derived["chars until"]


def _covered(starts: np.ndarray, n: int, until: np.ndarray) -> int:
    """Returns the number of characters of the words in n-grams that begin at one of ``starts`` (ascending)."""
    ends = np.minimum(starts + n, np.append(starts[1:], len(until)))
    return int((until[ends] - until[starts]).sum())


def _repeated_chars(words: list[str], n: int) -> int:
    """datatrove's ``find_all_duplicate``: number of characters in repeated n-grams, each skipped once it is found."""
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
