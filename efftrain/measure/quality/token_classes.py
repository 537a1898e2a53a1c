"""Classes of tokens by their text, such as words and numbers, for figures that are reported by class."""

from collections.abc import Callable

import numpy as np

CLASSES = ("special", "space", "number", "word", "punctuation")


def token_classes(texts: list[str]) -> np.ndarray:
    """The class of each token of a vocabulary.

    A token with several kinds of characters has the class of the first kind that occurs in it, in this order: digits,
    letters (and the underscore), other characters, white space.

    Args:
      texts: text of each token; "" for special tokens.

    Returns:
      (vocabulary,) int32 indices into ``CLASSES``.
    """
    kinds: tuple[tuple[str, Callable[[str], bool]], ...] = (
        ("number", lambda c: c.isdigit()),
        ("word", lambda c: c.isalpha() or c == "_"),
        ("punctuation", lambda c: not c.isspace()),
        ("space", lambda c: True),
    )

    def kind(text: str) -> str:
        return next((name for name, has in kinds if any(map(has, text))), "special")

    return np.array([CLASSES.index(kind(text)) for text in texts], np.int32)
