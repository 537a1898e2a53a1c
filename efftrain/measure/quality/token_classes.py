"""What kind of text a token stands for: where a model's depth goes is told by class."""

from collections.abc import Callable

import numpy as np

CLASSES = ("special", "space", "number", "word", "punctuation")


def token_classes(texts: list[str]) -> np.ndarray:
    """(vocabulary,) int32 index into ``CLASSES``, by the text of each token.

    A special token has the text "". A token of several kinds counts by the first that it has any of: digits, letters
    (and the underscore), other characters, white space.
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
