"""The words and sentences of datatrove 0.10 for English: the tokens of spaCy's blank pipeline and its sentencizer.

``SpaCyTokenizer`` in datatrove's ``word_tokenizers.py``. Punctuation is a word there, which moves every share of words.
"""

import functools
import importlib.util
import re
from functools import cached_property

from efftrain.data.documents import Text
from efftrain.errors import ConfigError

_MISSING = "datatrove's words are spaCy's, which is not installed; install it with: pip install 'efftrain[datatrove]'"


class SpacyText(Text):
    """A text whose words are spaCy's tokens, without those of white space."""

    @cached_property
    def words(self) -> list[str]:
        nlp = _pipeline()
        with nlp.memory_zone():  # else spaCy keeps every word that it has ever seen
            return [word for token in nlp.tokenizer(_bounded(self.text)) if (word := token.text.strip())]


def with_words(text: Text, as_datatrove: bool) -> Text:
    """The text, with datatrove's words where ``as_datatrove``; these are found once per text."""
    if not as_datatrove:
        return text
    if "spacy" not in text.derived:
        text.derived["spacy"] = SpacyText(text.text, text.id)
    return text.derived["spacy"]


def spacy_sentences(line: str) -> int:
    """Sentences of one line that is not blank."""
    nlp = _pipeline()
    with nlp.memory_zone():
        return sum(1 for _ in nlp.get_pipe("sentencizer")(nlp.tokenizer(_bounded(line))).sents)


def check_spacy() -> None:
    """Raises ConfigError where spaCy is missing, without importing it."""
    if importlib.util.find_spec("spacy") is None:
        raise ConfigError(_MISSING)


def _bounded(text: str) -> str:
    """The text as spaCy can bear it: no half of a surrogate pair, none of its own symbols, no endless word.

    Its time is quadratic in the punctuation around a word and in the length of a word, so both are cut where they are
    longer than any of ordinary text.
    """
    text = text.encode(errors="replace").decode().replace("IS_ALPHA", "")  # datatrove takes it away, too
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
