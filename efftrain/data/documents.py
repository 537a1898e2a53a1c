"""What flows through the corpus room, and the view of a text that the rules share."""

import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np


@dataclass(frozen=True)
class Document:
    """One text with its provenance.

    Attributes:
      id: unique in the corpus and stable from run to run; the order of the corpus is a hash of it.
      text: the text. Whatever it was read from, its lines end in "\n" (not "\r\n" or "\r") and no byte order mark
        stands before it, so that no rule, comparison or tokenizer has to know of either.
      source: which source it came from.
      meta: JSON values. ``meta["package"]`` names the group that must not be torn apart between train and test.
    """

    id: str
    text: str
    source: str
    meta: dict = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "text", clean_lines(self.text))

    @property
    def package(self) -> str:
        """The group that goes to one split as a whole; a document without one is its own group."""
        return self.meta.get("package", self.id)


UNREADABLE = "unreadable"
"""The rule of a ``Skipped`` that stands for a file, or for all that follows in one: nobody knows how much is lost."""


def clean_lines(text: str) -> str:
    """The text with "\n" for every "\r\n" and "\r", and without a byte order mark before it."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removeprefix("\ufeff")


@dataclass(frozen=True)
class Skipped:
    """Something that could not become a document. It is counted under ``rule`` and listed in the removal evidence.

    Attributes:
      id: the file, or the file and line.
      rule: ``UNREADABLE`` where a file, or the rest of one, is lost; any other is about this one document.
      detail: what the reader said.
      n_bytes: its size in bytes, 0 where that is unknown.
    """

    id: str
    source: str
    rule: str
    detail: str
    n_bytes: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a text. The score is kept, so that a threshold can be judged after the fact."""

    keep: bool
    rule: str
    score: float


class Text:
    """A text with the counts that several rules need, each computed once and only when asked for.

    Attributes:
      text: the text.
      id: of its document, for rules that look a score up.
      n_chars: characters, white space included.
      derived: what the rules of one topic compute once and share, by a name of theirs.
    """

    def __init__(self, text: str, id: str = ""):
        self.text, self.id = text, id
        self.n_chars = len(text)
        self.derived: dict = {}

    @cached_property
    def utf8(self) -> bytes:
        """Raises UnicodeEncodeError where the text holds half a surrogate pair."""
        return self.text.encode()

    @cached_property
    def byte_counts(self) -> np.ndarray:
        """(256,) how often each byte value occurs."""
        return np.bincount(np.frombuffer(self.utf8, np.uint8), minlength=256)

    @cached_property
    def line_lengths(self) -> np.ndarray:
        """(lines,) characters of each line, without its newline."""
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
        """The lines that are not blank, without white space around them; every line boundary of Unicode counts."""
        return [line for line in map(str.strip, self.text.splitlines()) if line]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between blank lines, without white space around it."""
        return [paragraph for paragraph in map(str.strip, _BLANK_LINES.split(self.text)) if paragraph]

    @cached_property
    def words(self) -> list[str]:
        """The words: what stands between white space, punctuation included."""
        return self.text.split()

    @property
    def n_words(self) -> int:
        return len(self.words)

    @cached_property
    def word_ids(self) -> np.ndarray:
        """(words,) int64, the place of each word in ``vocabulary``: equal words, and only they, have equal numbers."""
        return self._numbered_words[0]

    @property
    def vocabulary(self) -> list[str]:
        """The distinct words in the order in which they first occur."""
        return self._numbered_words[1]

    @cached_property
    def word_counts(self) -> np.ndarray:
        """(vocabulary,) how often each distinct word occurs."""
        return np.bincount(self.word_ids, minlength=len(self.vocabulary))

    @cached_property
    def word_lengths(self) -> np.ndarray:
        """(vocabulary,) characters of each distinct word."""
        return np.fromiter(map(len, self.vocabulary), np.int64, len(self.vocabulary))

    @cached_property
    def n_visible(self) -> int:
        """Characters that are not white space."""
        return int(self.word_counts @ self.word_lengths)

    @cached_property
    def _numbered_words(self) -> tuple[np.ndarray, list[str]]:
        numbers = defaultdict(count().__next__)
        ids = np.fromiter(map(numbers.__getitem__, self.words), np.int64, len(self.words))
        return ids, list(numbers)


_BLANK_LINES = re.compile(r"\n\s*\n")
