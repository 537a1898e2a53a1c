"""The language of a text, by py3langid: langid.py (Lui and Baldwin 2012) as it is maintained, naive Bayes on bytes."""

import functools
from dataclasses import dataclass
from typing import ClassVar

from efftrain.data.documents import Text
from efftrain.data.rules.base import AtLeast
from efftrain.errors import ConfigError

# Its model walks through the bytes in Python, 1.5 to 2 MB/s; this much decides.
MAX_CHARS = 2000


@dataclass(frozen=True, kw_only=True)
class Language(AtLeast):
    """Score: probability that the first 2,000 characters are in ``language``, an ISO 639-1 code.

    Limit: 0.65, FineWeb's, whose classifier is another one (fastText); py3langid is surer of ordinary text.

    Raises:
      ConfigError: at the first text: py3langid is missing, or does not know the language.
    """

    name: ClassVar[str] = "language"
    limit: float = 0.65
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
