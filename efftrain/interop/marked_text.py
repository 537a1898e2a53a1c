"""Encodes text in which only some spellings of special tokens are special: those of a template, not those of a user.

The two are told apart by noncharacters of Unicode (U+FDD0 to U+FDEF), which are for such internal use and which no text
may contain: a special token that a user spells is broken apart by one before the template is rendered.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.data.storage.token_bytes import covered_bytes
from efftrain.data.storage.tokenizer import text_encoder
from efftrain.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BREAK, MARK, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdee", "\ufdef"
_DIGITS = [chr(0xFDD2 + digit) for digit in range(16)]
_RESERVED = re.compile("[\ufdd0-\ufdef]")


@dataclass(frozen=True)
class Encoded:
    """The tokens of a marked text.

    Attributes:
      ids: (n,) int32.
      inside: (n,) bool, whether a token has a character between ``BEGIN`` and ``END``.
      n_bytes: (n,) bytes of the text in UTF-8 that each token covers; special tokens cover none.
    """

    ids: np.ndarray
    inside: np.ndarray
    n_bytes: np.ndarray


def broken(value: Any, special: Sequence[str]) -> Any:
    """Returns a JSON value in whose texts a ``BREAK`` is inside of each special token that they spell.

    Raises:
      ConfigError: a text has a reserved character.
    """
    if isinstance(value, str):
        if found := _RESERVED.search(value):
            raise ConfigError(
                f"a message has the noncharacter U+{ord(found[0]):04X}, which is reserved for internal use; remove it"
            )
        return _pattern(special).sub(lambda match: match[0][0] + BREAK + match[0][1:], value) if special else value
    if isinstance(value, Mapping):
        return {name: broken(item, special) for name, item in value.items()}
    return [broken(item, special) for item in value] if isinstance(value, list | tuple) else value


def unbroken(text: str) -> str:
    """Returns a text without its ``BREAK``."""
    return text.replace(BREAK, "")


class MarkedEncoder:
    """Encodes texts of a chat template in which ``broken`` has treated what users say.

    Special tokens that are not broken apart become single tokens, as the library would encode them; all other text is
    ordinary text. The post-processor adds nothing.

    Args:
      tokenizer: the tokenizer, which is not changed.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        from tokenizers import AddedToken, Tokenizer

        content = json.loads(tokenizer.to_str())
        content["post_processor"] = None  # it adds tokens, and may cut spaces from the offsets
        own = Tokenizer.from_str(json.dumps(content))
        own.no_truncation()
        own.no_padding()
        special = {token.content: (i, token) for i, token in own.get_added_tokens_decoder().items() if token.special}
        self._marks = {text: MARK + _digits(number) for text, (number, _) in special.items()}
        self._special = _pattern(list(special)) if special else None
        # A token that is not special is found in a text even if special tokens are not.
        own.add_tokens(
            [
                AddedToken(
                    self._marks[text],
                    special=False,
                    normalized=False,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                )
                for text, (_, token) in special.items()
            ]
        )
        own.encode_special_tokens = True
        self._encoder = text_encoder(own)

    def encode(self, text: str) -> Encoded:
        """Encodes a text, of which ``BEGIN`` and ``END`` mark parts and become no tokens.

        A token that reaches over the beginning or end of a part is inside of it, except for a special token whose own
        text is outside.
        """
        marked = self._special.sub(lambda match: self._marks[match[0]], text) if self._special else text
        marked, inside_c = _parts(unbroken(marked))
        encoding = self._encoder.encode(marked, add_special_tokens=False)
        n_bytes = covered_bytes(marked, encoding.offsets)
        ids, inside = np.array(encoding.ids, np.int32), np.zeros(len(encoding.ids), bool)
        inside_before = np.concatenate([[0], np.cumsum(inside_c)])
        for i, (start, stop) in enumerate(encoding.offsets):
            at = marked.find(MARK, start, stop)
            if at < 0:
                inside[i] = inside_before[stop] > inside_before[start]
                continue
            ids[i], inside[i], n_bytes[i] = _number(marked[at + 1 : at + 1 + _N_DIGITS]), inside_c[at], 0
        return Encoded(ids, inside, n_bytes)


def _parts(text: str) -> tuple[str, np.ndarray]:
    """Returns a text without ``BEGIN`` and ``END``, and for each character whether it was between them."""
    pieces, flags = [], []
    for piece in re.split(f"([{BEGIN}{END}])", text):
        if piece in (BEGIN, END):
            flags.append(piece == BEGIN)
        else:
            pieces.append((piece, bool(flags) and flags[-1]))
    lengths = [len(piece) for piece, _ in pieces]
    return "".join(piece for piece, _ in pieces), np.repeat([flag for _, flag in pieces], lengths)


_N_DIGITS = 5  # 16 to this power is more than any vocabulary has entries


def _digits(number: int) -> str:
    return "".join(_DIGITS[number >> 4 * place & 15] for place in reversed(range(_N_DIGITS)))


def _number(digits: str) -> int:
    return sum(_DIGITS.index(digit) << 4 * place for place, digit in enumerate(reversed(digits)))


def _pattern(special: Sequence[str]) -> re.Pattern[str]:
    """Matches any of the special tokens that is not broken, the longest one that begins at a place."""
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?!{BREAK})")
