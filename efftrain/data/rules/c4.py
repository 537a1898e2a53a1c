"""Provides the rules of C4: Raffel et al. 2020 (JMLR 21, 140), following tensorflow_datasets, ``c4_utils.py``.

An edit first drops lines, and the rules then judge the rest of the page. Not implemented here are the list of bad
words, the limit of 190,000 characters, the removal of lines that other pages share (see ``data.dedup.lines``), and
language detection with langdetect (see ``language``). With ``as_datatrove``, an edit or rule works like
``c4_filters.py`` of datatrove 0.10; the differences are described after "datatrove:".
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast, AtMost, Edit, Rule
from efftrain.data.rules.spacy_words import check_spacy, spacy_sentences

POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


@dataclass(frozen=True, kw_only=True)
class C4Lines:
    """Drops lines that are not prose (menus, cookie and JavaScript notices) and removes citations such as [1].

    Lines are stripped of white space, and blank ones are dropped. A line for which C4 rejects the whole page is kept,
    so that the corresponding rule sees it.

    Attributes:
      min_words: lines with fewer words are dropped.
      max_word_length: lines with a longer word, in characters, are dropped.
      terminal_punctuation: drop lines that do not end in one of . ? ! " or that end in an ellipsis. Off by default,
        because this rule alone drops a large share of the tokens, and C4's other rules do better without it (FineWeb:
        Penedo et al. 2024, 3.5).
      as_datatrove: a line may also end in ', and words are counted before citations are removed.
    """

    name: ClassVar[str] = "c4/lines"
    min_words: int = 5
    max_word_length: int = 1000
    terminal_punctuation: bool = False
    as_datatrove: bool = False

    def edit(self, text: Text) -> Text:
        has_phrase = any(phrase in text.lowered for phrase in (*POLICY, "javascript"))
        lines = (self._strip(line, has_phrase) for line in text.text.splitlines())
        kept = "\n".join(line for line in lines if line).strip()
        return text if kept == text.text else Text(kept, text.id)

    def _strip(self, line: str, has_phrase: bool) -> str:
        """Returns the line without citations, or "" to drop it; ``has_phrase``: the page has a forbidden phrase."""
        words = line.split()
        if len(words) < self.min_words or (
            len(line) > self.max_word_length and max(map(len, words), default=0) > self.max_word_length
        ):
            return ""  # checked before citations are removed, because that can only shorten a line
        line = line.strip()
        if "[" in line:
            line = _CITATION.sub("", line)
            if not self.as_datatrove and len(line.split()) < self.min_words:
                return ""
        if self.terminal_punctuation:
            ends = (*_ENDS, "'") if self.as_datatrove else _ENDS
            if not line.endswith(ends) or line.endswith("..."):
                return ""
        return "" if has_phrase and _is_forbidden(line) else line


def _is_forbidden(line: str) -> bool:
    """Returns whether C4 drops the line for a phrase, and not the whole page for another that it checks earlier."""
    lowered = line.lower()
    if "lorem ipsum" in lowered:
        return False
    return "javascript" in lowered or ("{" not in line and any(phrase in lowered for phrase in POLICY))


@dataclass(frozen=True, kw_only=True)
class LoremIpsum(AtMost):
    """Rejects placeholder text. Score: number of occurrences of "lorem ipsum"."""

    name: ClassVar[str] = "c4/lorem_ipsum"
    threshold: int = 0

    def score(self, text: Text) -> float:
        return float(text.lowered.count("lorem ipsum"))


@dataclass(frozen=True, kw_only=True)
class CurlyBrackets(AtMost):
    """Rejects pages with code; omit this rule if a corpus should contain code. Score: number of opening brackets."""

    name: ClassVar[str] = "c4/curly_brackets"
    threshold: int = 0

    def score(self, text: Text) -> float:
        return float(text.text.count("{"))


@dataclass(frozen=True, kw_only=True)
class Sentences(AtLeast):
    """Rejects pages with too little prose. Score: number of sentences, counted line by line.

    A sentence ends at . ? or ! with optional closing quotes, if white space follows and then no lower-case letter; the
    rest of a line is one more sentence. C4 used the trained splitter of NLTK, which also recognises abbreviations.
    datatrove: the sentencizer of spaCy, see ``spacy_words``.
    """

    name: ClassVar[str] = "c4/sentences"
    threshold: int = 3
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return float(sum(map(spacy_sentences if self.as_datatrove else count_sentences, text.lines)))


@dataclass(frozen=True, kw_only=True)
class C4:
    """The rule set of C4, with the thresholds of its original code except that terminal punctuation is not required.

    ``min_sentences`` is the threshold of ``Sentences``; the other fields are those of ``C4Lines``.
    """

    min_words: int = 5
    max_word_length: int = 1000
    min_sentences: int = 3
    terminal_punctuation: bool = False
    as_datatrove: bool = False

    @classmethod
    def datatrove(cls) -> "C4":
        """Returns the configuration that edits and decides like datatrove's C4QualityFilter; needs extra ``datatrove``.

        The two differ in one detail: for a page with both a curly bracket and lorem ipsum, datatrove reports the one
        that comes first, and this rule set always reports lorem ipsum.
        """
        check_spacy()
        return cls(min_words=3, min_sentences=5, terminal_punctuation=True, as_datatrove=True)

    def rules(self) -> tuple[Edit | Rule, ...]:
        lines = C4Lines(
            min_words=self.min_words,
            max_word_length=self.max_word_length,
            terminal_punctuation=self.terminal_punctuation,
            as_datatrove=self.as_datatrove,
        )
        sentences = Sentences(threshold=self.min_sentences, as_datatrove=self.as_datatrove)
        return lines, LoremIpsum(), CurlyBrackets(), sentences


def count_sentences(line: str) -> int:
    """Returns the number of sentences in a line that is not blank."""
    return 1 + len(_BETWEEN_SENTENCES.findall(line))


_ENDS = (".", "?", "!", '"')
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
# The repetition is bounded, so that the time for a row of quotes is linear in its length.
_BETWEEN_SENTENCES = re.compile(r"""[.?!]["'”’»)\]]{0,3}\s+(?![a-zß-öø-ÿ\s])""")
