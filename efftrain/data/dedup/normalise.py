"""Normalises texts in Unicode before they are divided into words and hashed.

Two texts that look the same to a reader get the same words. Each character is replaced by its ``NFKC_Casefold``
(Unicode Standard, section 3.13, and UAX 15): compatibility forms such as full-width letters and ligatures become plain,
case is folded, and invisible characters (soft hyphen, zero-width space and joiners, word joiner, byte order mark,
direction marks, variation selectors) are deleted, so that a word continues across them. The result is composed (NFC).
Punctuation, symbols, control characters and spaces of any kind, including no-break spaces, become a space; letters,
digits and combining marks are parts of words.

ASCII texts are returned unchanged: ``shingles`` converts them to lower case and separates words byte by byte, with the
same result.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# The characters of Default_Ignorable_Code_Point (Unicode's DerivedCoreProperties) outside the category Cf.
_INVISIBLE = ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x3164, 0x3164))
_INVISIBLE += ((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))

_CODE = np.uint32(0x1FFFFF)
_DROPPED, _EXPANDS, _COMPOSES, _UNKNOWN = (np.uint32(1 << bit) for bit in (24, 25, 26, 27))
_CHUNK = 1 << 16  # number of characters whose arrays fit into the cache

# The replacement of each character, or the character with a flag. Entries are computed when a character first occurs,
# because most of the 1.1 million never do and computing all would take seconds. NUL separates texts.
_table = np.full(0x110000, _UNKNOWN, np.uint32)
_table[:0x80] = [0, *(ord(char.lower()) if char.isalnum() else 0x20 for char in map(chr, range(1, 0x80)))]
_expansions: dict[int, str] = {}


def normalise(texts: Sequence[bytes]) -> list[bytes]:
    """Normalises texts in UTF-8, so that each word has one spelling.

    Args:
      texts: UTF-8; invalid bytes separate words.

    Returns:
      A text for each text: unchanged if it is ASCII, otherwise normalised as described in the module. ASCII characters
      may remain unnormalised (capitals, punctuation), as in ASCII texts.
    """
    result = list(texts)
    if all(map(bytes.isascii, texts)):
        return result
    others = [number for number, text in enumerate(texts) if not text.isascii()]
    joined = b"\0".join([texts[number].replace(b"\0", b" ") for number in others])
    for number, text in zip(others, _normalise(joined.decode(errors="replace")), strict=True):
        result[number] = text.encode()
    return result


def _normalise(joined: str) -> list[str]:
    """Normalises texts that are joined by NUL, and returns them separately."""
    pieces, expanding, marks = [], set(), []
    for start in range(0, len(joined), _CHUNK):
        codes = np.frombuffer(joined[start : start + _CHUNK].encode("utf-32-le"), "<u4")
        mapped, flags = _replace(codes)
        if flags & _UNKNOWN:
            for code in set(codes[mapped & _UNKNOWN != 0].tolist()):
                _learn(code)
            mapped, flags = _replace(codes)
        if flags & _COMPOSES:
            marks.append(start + np.flatnonzero(mapped & _COMPOSES))
        if flags & _DROPPED:
            mapped = mapped[mapped & _DROPPED == 0]
        if flags & _EXPANDS:
            expanding.update((mapped[mapped & _EXPANDS != 0] & _CODE).tolist())
        pieces.append((mapped & _CODE if flags > _CODE else mapped).tobytes().decode("utf-32-le"))
    result = "".join(pieces)
    for code in expanding:  # every text has few of them, and each needs one pass in C
        result = result.replace(chr(code), _expansions[code])
    texts = result.split("\0")
    if marks:
        ends = np.cumsum([len(text) + 1 for text in joined.split("\0")])
        for number in np.unique(np.searchsorted(ends, np.concatenate(marks), side="right")):
            texts[number] = _compose(texts[number])
    return texts


def _replace(codes: np.ndarray) -> tuple[np.ndarray, np.uint32]:
    """Returns the table entries of the characters, and the flags that occur in them. ASCII may remain unchanged."""
    high = codes >= 0x80
    if 8 * np.count_nonzero(high) > len(codes):
        mapped = np.take(_table, codes, mode="clip")  # faster than with a check of the bounds
        return mapped, np.bitwise_or.reduce(mapped)
    mapped, rare = codes.copy(), np.flatnonzero(high)
    mapped[rare] = entries = _table[codes[rare]]
    return mapped, np.bitwise_or.reduce(entries)  # 0 if there are none


def _compose(text: str) -> str:
    """Composes a text (NFC), word by word, since a single mark that might compose puts Python's NFC on its slow path.

    ASCII is converted to lower case first: ``_replace`` may have left capitals, which would be missed later as parts
    of composed characters.
    """
    words = text.encode().lower().decode().split(" ")
    return " ".join([_composed(word) if len(word) <= 32 else unicodedata.normalize("NFC", word) for word in words])


@lru_cache(maxsize=1 << 15)
def _composed(word: str) -> str:
    return unicodedata.normalize("NFC", word)


def _learn(code: int) -> None:
    folded = _replacement(chr(code))
    value = _DROPPED
    if len(folded) == 1:
        value = np.uint32(ord(folded))
    elif folded:
        _expansions[code] = folded
        value = np.uint32(code) | _EXPANDS
    _table[code] = value | (_COMPOSES if any(map(_may_compose, folded)) else np.uint32(0))


def _replacement(char: str) -> str:
    """Returns the folded character, a space if it is not part of a word, or an empty string if it is invisible."""
    if _is_invisible(char):
        return ""
    folded = unicodedata.normalize("NFKC", char)
    for _ in range(2):  # case folding can create characters that NFKC decomposes, and the reverse
        folded = unicodedata.normalize("NFKC", folded.casefold())
    folded = "".join(part if _in_word(part) else " " for part in folded if not _is_invisible(part))
    # A spacing accent is a symbol or punctuation, but decomposes into a space and a combining mark.
    separates = unicodedata.category(char)[0] in "SP"
    return " " if separates and all(unicodedata.category(part)[0] in "MZ" for part in folded) else folded


def _in_word(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LMN" or category in ("Co", "Cn")


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or any(low <= ord(char) <= high for low, high in _INVISIBLE)


def _may_compose(char: str) -> bool:
    """Returns whether NFC may join the character with the one before it or reorder it: marks and conjoining jamo."""
    return unicodedata.category(char)[0] == "M" or 0x1100 <= ord(char) <= 0x11FF
