"""C4's rules: Raffel et al. 2020 (JMLR 21, 140), after the code that made C4 (tensorflow_datasets, ``c4_utils.py``).

Lines are dropped first, by an edit, and then the page is judged by what is left. Not here: the list of bad words, the
limit of 190,000 characters, lines that other pages have, and langdetect (``language`` has a rule). datatrove is
``c4_filters.py``, 0.10.
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
    """Strips citations such as [1] and drops lines that are no prose: menus, notices of cookies, of JavaScript.

    Lines lose the white space around them, blank ones go. A line for which C4 rejects the whole page stays, so that
    the rule for it sees it.

    Attributes:
      min_words: shorter lines go.
      max_word_length: lines with a longer word go.
      terminal_punctuation: whether a line has to end in one of . ? ! " and not in an ellipsis. FineWeb (Penedo et al.
        2024, 3.5) measured that this alone drops 30 % of the tokens and that the rest of C4's rules does better
        without it.
      as_datatrove: ' ends a line, too, and words are counted before citations go.
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
        """The line without citations, or nothing where it goes; ``has_phrase``: the page has one that forbids lines."""
        words = line.split()
        if len(words) < self.min_words or (
            len(line) > self.max_word_length and max(map(len, words), default=0) > self.max_word_length
        ):
            return ""  # taking citations away can make a line shorter, but never longer
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
    """Whether C4 drops the line for a phrase, and not the whole page for another that it looks for earlier."""
    lowered = line.lower()
    if "lorem ipsum" in lowered:
        return False
    return "javascript" in lowered or ("{" not in line and any(phrase in lowered for phrase in POLICY))


@dataclass(frozen=True, kw_only=True)
class LoremIpsum(AtMost):
    """Placeholder text. Score: how often the phrase occurs."""

    name: ClassVar[str] = "c4/lorem_ipsum"
    limit: int = 0

    def score(self, text: Text) -> float:
        return float(text.lowered.count("lorem ipsum"))


@dataclass(frozen=True, kw_only=True)
class CurlyBrackets(AtMost):
    """Code between the prose; leave this rule out for a corpus that wants code. Score: opening brackets."""

    name: ClassVar[str] = "c4/curly_brackets"
    limit: int = 0

    def score(self, text: Text) -> float:
        return float(text.text.count("{"))


@dataclass(frozen=True, kw_only=True)
class Sentences(AtLeast):
    """Too little prose is left. Score: sentences, each line counted for itself.

    A sentence ends where . ? or ! and closing quotes stand before white space and no lower-case letter follows; what
    remains of a line is one more. C4 used NLTK's trained splitter, which knows abbreviations, too. datatrove: spaCy's
    sentencizer, see ``spacy_words``.
    """

    name: ClassVar[str] = "c4/sentences"
    limit: int = 3
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return float(sum(map(spacy_sentences if self.as_datatrove else count_sentences, text.lines)))


@dataclass(frozen=True, kw_only=True)
class C4:
    """The rules above with the thresholds of the code that made C4, but for the terminal punctuation."""

    min_words: int = 5
    max_word_length: int = 1000
    min_sentences: int = 3
    terminal_punctuation: bool = False
    as_datatrove: bool = False

    @classmethod
    def datatrove(cls) -> "C4":
        """Edits and decides as datatrove's C4QualityFilter does; needs the extra ``datatrove``.

        Of a page that has both, it names the curly bracket where that comes first; here it is always lorem ipsum.
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
        sentences = Sentences(limit=self.min_sentences, as_datatrove=self.as_datatrove)
        return lines, LoremIpsum(), CurlyBrackets(), sentences


def count_sentences(line: str) -> int:
    """Sentences of one line that is not blank."""
    return 1 + len(_BETWEEN_SENTENCES.findall(line))


_ENDS = (".", "?", "!", '"')
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
# Bounded, so that a row of quotes costs no more than its length.
_BETWEEN_SENTENCES = re.compile(r"""[.?!]["'”’»)\]]{0,3}\s+(?![a-zß-öø-ÿ\s])""")
