"""Provides Gopher's rules for the quality of prose: Rae et al. 2021 (arXiv 2112.11446), appendix A.1.1.

The paper does not define a word, a bullet or a line. Here, words are separated by white space, and each rule states its
other definitions. With ``as_datatrove``, a rule scores like ``gopher_quality_filter.py`` of datatrove 0.10, whose words
are the tokens of spaCy (see ``spacy_words``); other differences are described after "datatrove:".
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast, AtMost, Between, Rule
from efftrain.data.rules.spacy_words import check_spacy, with_words
from efftrain.data.rules.words import BULLETS, DATATROVE_PUNCTUATION, ELLIPSES, stop_words
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WordCount(Between):
    """Rejects texts that are too short to learn from, and dumps. Score: number of words with a letter or a digit.

    datatrove: number of words that are not only punctuation.
    """

    name: ClassVar[str] = "gopher/words"
    low: int = 50
    high: int = 100_000
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        text = with_words(text, self.as_datatrove)
        return float(text.word_counts[_proper_words(text, self.as_datatrove)].sum())


@dataclass(frozen=True, kw_only=True)
class MeanWordLength(Between):
    """Rejects texts that are not words of a language.

    Score: mean number of characters of the words that ``WordCount`` counts; 0 if there are none.
    """

    name: ClassVar[str] = "gopher/mean_word_length"
    low: float = 3.0
    high: float = 10.0
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        text = with_words(text, self.as_datatrove)
        counts = text.word_counts * _proper_words(text, self.as_datatrove)
        return float(counts @ text.word_lengths) / max(int(counts.sum()), 1)


@dataclass(frozen=True, kw_only=True)
class HashRatio(AtMost):
    """Rejects lists of tags. Score: number of '#' per word."""

    name: ClassVar[str] = "gopher/hash_ratio"
    threshold: float = 0.1
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return text.text.count("#") / max(with_words(text, self.as_datatrove).n_words, 1)


@dataclass(frozen=True, kw_only=True)
class EllipsisRatio(AtMost):
    """Rejects truncated teasers. Score: number of ellipses per word, written as three dots or as one character."""

    name: ClassVar[str] = "gopher/ellipsis_ratio"
    threshold: float = 0.1
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return sum(map(text.text.count, ELLIPSES)) / max(with_words(text, self.as_datatrove).n_words, 1)


@dataclass(frozen=True, kw_only=True)
class BulletLines(AtMost):
    """Rejects texts that are only a list. Score: share of the lines that begin with a bullet, without blank lines.

    datatrove: blank lines count, and only '•' and '-' are bullets.
    """

    name: ClassVar[str] = "gopher/bullet_lines"
    threshold: float = 0.9
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        bullets = ("•", "-") if self.as_datatrove else BULLETS
        return sum(line.startswith(bullets) for line in text.lines) / _n_lines(text, self.as_datatrove)


@dataclass(frozen=True, kw_only=True)
class EllipsisLines(AtMost):
    """Rejects lists of teasers. Score: share of the lines that end in an ellipsis, without blank lines.

    datatrove: blank lines count.
    """

    name: ClassVar[str] = "gopher/ellipsis_lines"
    threshold: float = 0.3
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        return sum(line.endswith(ELLIPSES) for line in text.lines) / _n_lines(text, self.as_datatrove)


@dataclass(frozen=True, kw_only=True)
class AlphabeticWords(AtLeast):
    """Rejects tables and logs. Score: share of the words that have a letter; 0 if there are no words."""

    name: ClassVar[str] = "gopher/alphabetic_words"
    threshold: float = 0.8
    as_datatrove: bool = False

    def score(self, text: Text) -> float:
        text = with_words(text, self.as_datatrove)
        return float(text.word_counts[_has_letter(text)].sum()) / max(text.n_words, 1)


@dataclass(frozen=True, kw_only=True)
class StopWords(AtLeast):
    """Rejects texts in another language or without sentences. Score: number of distinct stop words, ignoring case.

    datatrove: case matters, and punctuation is a word of its own.

    Raises:
      ConfigError: there are no stop words for the language, or it is not English and ``as_datatrove`` is set.
    """

    name: ClassVar[str] = "gopher/stop_words"
    threshold: int = 2
    language: str = "en"
    as_datatrove: bool = False

    def __post_init__(self):
        _check_language(self.language, self.as_datatrove)

    def score(self, text: Text) -> float:
        words = with_words(text, self.as_datatrove).vocabulary
        if not self.as_datatrove:
            lowered = " ".join(words).lower().split()
            words = (word if word.isalpha() else word.strip(_AROUND_WORDS) for word in lowered)
        return float(len(stop_words(self.language).intersection(words)))


@dataclass(frozen=True, kw_only=True)
class Gopher:
    """The rule set of Gopher with the thresholds of the paper, in the order of datatrove.

    Fields that begin with ``min_`` or ``max_`` are the thresholds of the rules of this module; ``language`` is that of
    the stop words, an ISO 639-1 code.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_hash_ratio: float = 0.1
    max_ellipsis_ratio: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    language: str = "en"
    as_datatrove: bool = False

    def __post_init__(self):
        _check_language(self.language, self.as_datatrove)

    @classmethod
    def datatrove(cls) -> "Gopher":
        """Returns the configuration that scores and decides like datatrove's GopherQualityFilter.

        Needs the extra ``datatrove``.
        """
        check_spacy()
        return cls(as_datatrove=True)

    def rules(self) -> tuple[Rule, ...]:
        return (
            WordCount(low=self.min_words, high=self.max_words, as_datatrove=self.as_datatrove),
            MeanWordLength(low=self.min_word_length, high=self.max_word_length, as_datatrove=self.as_datatrove),
            HashRatio(threshold=self.max_hash_ratio, as_datatrove=self.as_datatrove),
            EllipsisRatio(threshold=self.max_ellipsis_ratio, as_datatrove=self.as_datatrove),
            BulletLines(threshold=self.max_bullet_lines, as_datatrove=self.as_datatrove),
            EllipsisLines(threshold=self.max_ellipsis_lines, as_datatrove=self.as_datatrove),
            AlphabeticWords(threshold=self.min_alphabetic_words, as_datatrove=self.as_datatrove),
            StopWords(threshold=self.min_stop_words, language=self.language, as_datatrove=self.as_datatrove),
        )


def _check_language(language: str, as_datatrove: bool) -> None:
    stop_words(language)
    if as_datatrove and language != "en":
        raise ConfigError(f"language is {language!r}, but as_datatrove supports only English; use language='en'")


def _has_letter(text: Text) -> np.ndarray:
    """Returns (vocabulary,) bool, True for words with a letter."""
    if "has letter" not in text.derived:
        found = [word.isalpha() or any(map(str.isalpha, word)) for word in text.vocabulary]
        text.derived["has letter"] = np.array(found, bool)
    return text.derived["has letter"]


def _proper_words(text: Text, as_datatrove: bool) -> np.ndarray:
    """Returns (vocabulary,) bool, True for words that are not only symbols."""
    key = ("proper words", as_datatrove)
    if key not in text.derived:
        proper = _has_letter(text).copy()
        for number in np.flatnonzero(~proper):
            word = text.vocabulary[number]
            proper[number] = not DATATROVE_PUNCTUATION.issuperset(word) if as_datatrove else any(map(str.isalnum, word))
        text.derived[key] = proper
    return text.derived[key]


def _n_lines(text: Text, with_blank: bool) -> int:
    return max(len(text.text.splitlines() if with_blank else text.lines), 1)


_AROUND_WORDS = "".join(sorted(DATATROVE_PUNCTUATION))
