"""Splits English text into words and sentences like datatrove 0.10: with spaCy's blank pipeline and its sentencizer.

It corresponds to ``SpaCyTokenizer`` in datatrove's ``word_tokenizers.py``. Punctuation marks are words there, which
changes every share of words.
"""

import functools
import importlib.util
import re
from functools import cached_property

from efftrain.data.documents import Text
from efftrain.errors import ConfigError

_MISSING = "datatrove's words are spaCy's, which is not installed; install it with: pip install 'efftrain[datatrove]'"


class SpacyText(Text):
    """A text whose words are the tokens of spaCy that are not white space."""

    @cached_property
    def words(self) -> list[str]:
        nlp = _pipeline()
        with nlp.memory_zone():  # otherwise spaCy keeps every word that it has ever seen
            return [word for token in nlp.tokenizer(_bounded(self.text)) if (word := token.text.strip())]


def with_words(text: Text, as_datatrove: bool) -> Text:
    """Returns the text, with datatrove's words if ``as_datatrove`` is set. They are computed once per text."""
    if not as_datatrove:
        return text
    if "spacy" not in text.derived:
        text.derived["spacy"] = SpacyText(text.text, text.id)
    return text.derived["spacy"]


def spacy_sentences(line: str) -> int:
    """Returns the number of sentences in a line that is not blank."""
    nlp = _pipeline()
    with nlp.memory_zone():
        return sum(1 for _ in nlp.get_pipe("sentencizer")(nlp.tokenizer(_bounded(line))).sents)


def check_spacy() -> None:
    """Raises ConfigError if spaCy is not installed, without importing it."""
    if importlib.util.find_spec("spacy") is None:
        raise ConfigError(_MISSING)


def _bounded(text: str) -> str:
    """Returns the text without what spaCy cannot process: unpaired surrogates, its symbol IS_ALPHA, very long words.

    The time of spaCy is quadratic in the length of a word and of the punctuation around it, so that both are split if
    they are longer than in any ordinary text.
    """
    text = text.encode(errors="replace").decode().replace("IS_ALPHA", "")  # datatrove removes it as well
    return _LONG_WORD.sub(r"\g<0> ", _LONG_PUNCTUATION.sub(r"\g<0> ", text))


@functools.cache
def _pipeline():
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    nlp = spacy.blank("en")
    nlp.add_pipe("sentencizer")
    return nlp


_LONG_PUNCTUATION = re.compile(r"[^\w\s]{64}(?=[^\w\s])")
_LONG_WORD = re.compile(r"\S{2000}(?=\S)")
