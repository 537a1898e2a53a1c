"""Identifies the language of a text with py3langid, a maintained langid.py (Lui and Baldwin 2012): Bayes on bytes."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast
from efftrain.errors import ConfigError

# py3langid loops over the bytes in Python, which is slow; this many characters are enough to decide.
MAX_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Language(AtLeast):
    """Keeps texts in one language. Score: probability that the first 2,000 characters are in this language.

    The default threshold is that of FineWeb, which uses another classifier (fastText); py3langid gives higher
    probabilities for ordinary text.

    Attributes:
      threshold: lowest probability at which a text is kept.
      language: the ISO 639-1 code of the language.

    Raises:
      ConfigError: (by ``score``) py3langid is missing, or does not know the language.
    """

    name: ClassVar[str] = "language"
    threshold: float = 0.65
    language: str = "en"

    def score(self, text: Text) -> float:
        identifier = _identifier()
        if self.language not in identifier.labels:
            known = ", ".join(sorted(identifier.labels))
            raise ConfigError(f"language is {self.language!r}, which py3langid does not know; use one of {known}")
        return float(dict(identifier.rank(text.text[:MAX_CHARS]))[self.language])


@functools.cache
def _identifier():
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ConfigError(
            "the rule Language needs py3langid; install it with: pip install 'efftrain[language]'"
        ) from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
