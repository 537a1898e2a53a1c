"""Defines the types that the data pipeline passes on: documents, verdicts and the counts of a text for the rules."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np

GROUP = "group"
"""The key of ``Document.meta`` that names the group of a document."""
OLD_GROUP = "package"
"""The same key as earlier versions wrote it."""


@dataclass(frozen=True)
class Document:
    """One text with its provenance.

    Attributes:
      id: unique in the corpus and stable from run to run; documents are ordered by a hash of their id.
      text: the text. Its lines end in "\n" (not "\r\n" or "\r") and it has no leading byte order mark, whatever the
        format that it was read from, so that rules, comparisons and tokenizers need not handle either.
      source: name of the source that the document was read from.
      meta: JSON values. ``meta["group"]`` names the group of documents that must stay together in one split.
    """

    id: str
    text: str
    source: str
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "text", clean_lines(self.text))

    @property
    def group(self) -> str:
        """The group that is assigned to one split as a whole; a document without one is a group of its own."""
        return self.meta.get(GROUP, self.meta.get(OLD_GROUP, self.id))


UNREADABLE = "unreadable"
"""The rule of a ``Skipped`` for a lost file, or for the lost rest of one; the number of lost documents is unknown."""


def clean_lines(text: str) -> str:
    """Returns the text with "\n" in place of every "\r\n" and "\r", and without a leading byte order mark."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff")


@dataclass(frozen=True)
class Skipped:
    """A file or record that could not become a document. It is counted under ``rule`` and listed among the removals.

    Attributes:
      id: the file, or the file and the position in it.
      source: name of the source that it was read from.
      rule: ``UNREADABLE`` if a file, or the rest of one, is lost; any other rule concerns this one document.
      detail: the reason that the reader gave.
      n_bytes: size in bytes; 0 if unknown.
    """

    id: str
    source: str
    rule: str
    detail: str
    n_bytes: int = 0


@dataclass(frozen=True)
class Verdict:
    """The decision of a rule on a text, with its score, from which other thresholds can be judged later.

    Attributes:
      keep: whether the text passes the rule.
      rule: name of the rule.
      score: the value that the rule compared with its threshold.
    """

    keep: bool
    rule: str
    score: float


class Text:
    """A text with the counts that several rules need. Each count is computed once, when it is first read.

    Attributes:
      text: the text.
      id: the id of its document, for rules that look up a score by id.
      n_chars: number of characters, white space included.
      derived: cache of values that the rules of one topic compute once and share, by a key that they choose.
    """

    def __init__(self, text: str, id: str = ""):
        self.text, self.id = text, id
        self.n_chars = len(text)
        self.derived: dict = {}

    @cached_property
    def utf8(self) -> bytes:
        """The text in UTF-8. Raises UnicodeEncodeError if the text contains an unpaired surrogate."""
        return self.text.encode()

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """(256,) number of occurrences of each byte value in UTF-8."""
        return np.bincount(np.frombuffer(self.utf8, np.uint8), minlength=256)

    @cached_property
    def line_lengths(self) -> np.ndarray:
        """(lines,) number of characters of each line, without its newline."""
        if not self.text.isascii():
            return np.fromiter(map(len, self.text.split("\n")), np.int64)
        newlines = np.flatnonzero(np.frombuffer(self.utf8, np.uint8) == ord("\n"))
        return np.diff(newlines, prepend=-1, append=self.n_chars) - 1

    @cached_property
    def lowered(self) -> str:
        """The text in lower case."""
        return self.text.lower()

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not blank, stripped of white space. Lines end at every line boundary of Unicode."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """The paragraphs, which blank lines separate, stripped of white space."""
        return [paragraph for paragraph in map(str.strip, _BLANK_LINES.split(self.text)) if paragraph]

    @cached_property
    def words(self) -> list[str]:
        """The words, which white space separates, with their punctuation."""
        return self.text.split()

    @property
    def n_words(self) -> int:
        return len(self.words)

    @cached_property
    def word_ids(self) -> np.ndarray:
        """(words,) int64, the index of each word in ``vocabulary``."""
        return self._numbered_words[0]

    @property
    def vocabulary(self) -> list[str]:
        """The distinct words, in the order of their first occurrence."""
        return self._numbered_words[1]

    @cached_property
    def word_counts(self) -> np.ndarray:
        """(vocabulary,) number of occurrences of each distinct word."""
        return np.bincount(self.word_ids, minlength=len(self.vocabulary))

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """(vocabulary,) number of characters of each distinct word."""
        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    @cached_property
    def n_visible(self) -> int:
        """Number of characters that are not white space."""
        return int(self.word_counts @ self.word_lengths)

    @cached_property
    def _numbered_words(self) -> tuple[np.ndarray, list[str]]:
        numbers = defaultdict(count().__next__)
        ids = np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))
        return ids, list(numbers)


_BLANK_LINES = re.compile(r"\n\s*\n")
