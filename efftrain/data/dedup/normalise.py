"""Unicode normalisation of texts before they are cut into words and hashed.

Two texts that a reader would call the same get the same words. Each character is replaced by its ``NFKC_Casefold``
(Unicode Standard, section 3.13, and UAX 15): compatibility forms such as full-width letters and ligatures become plain,
case is folded, and invisible characters (soft hyphen, zero-width space and joiners, word joiner, byte order mark,
direction marks, variation selectors) vanish, so that a word continues across them. The result is composed (NFC). Then
punctuation, symbols, controls and spaces of any kind, the no-break ones included, become a space; letters, digits and
combining marks belong to words.

ASCII texts are returned as they are: ``shingles`` lower-cases and separates them byte by byte, with the same result.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Default_Ignorable_Code_Point (Unicode's DerivedCoreProperties) outside the category Cf.
_INVISIBLE = ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0x3164, 0x3164))
_INVISIBLE += ((0xFE00, 0xFE0F), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))

_CODE = np.uint32(0x1FFFFF)
_DROPPED, _EXPANDS, _COMPOSES, _UNKNOWN = (np.uint32(1 << bit) for bit in (24, 25, 26, 27))
_CHUNK = 1 << 16  # characters whose arrays stay in the cache

# What becomes of each character: its replacement, or itself with a flag. Filled as characters are met: most of the
# 1.1 million never are, and asking for all would take seconds. NUL separates texts.
_table = np.full(0x110000, _UNKNOWN, np.uint32)
_table[:0x80] = [0, *(ord(char.lower()) if char.isalnum() else 0x20 for char in map(chr, range(1, 0x80)))]
_expansions: dict[int, str] = {}


def normalise(texts: Sequence[bytes]) -> list[bytes]:
    """Texts in UTF-8 with the same words as before, in one spelling.

    Args:
      texts: UTF-8; what is not valid UTF-8 separates words.

    Returns:
      A text for each: as it was where it is ASCII, otherwise normalised as the module says. ASCII in it may still be
      in capitals and punctuation, as in ASCII texts.
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
    """Texts that are joined by NUL."""
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
    for code in expanding:  # few in any text, each one pass in C
        result = result.replace(chr(code), _expansions[code])
    texts = result.split("\0")
    if marks:
        ends = np.cumsum([len(text) + 1 for text in joined.split("\0")])
        for number in np.unique(np.searchsorted(ends, np.concatenate(marks), side="right")):
            texts[number] = _compose(texts[number])
    return texts


def _replace(codes: np.ndarray) -> tuple[np.ndarray, np.uint32]:
    """The table's entries for the characters, and the flags that occur in them. ASCII may be left to the kernel."""
    high = codes >= 0x80
    if 8 * np.count_nonzero(high) > len(codes):
        mapped = np.take(_table, codes, mode="clip")  # twice as fast as with a check of the bounds
        return mapped, np.bitwise_or.reduce(mapped)
    mapped, rare = codes.copy(), np.flatnonzero(high)
    mapped[rare] = entries = _table[codes[rare]]
    return mapped, np.bitwise_or.reduce(entries)  # 0 where there are none


def _compose(text: str) -> str:
    """NFC. Word by word: with one mark that might compose, a whole text takes Python's slow path.

    ``_replace`` may have left ASCII in capitals, which as part of a composed character nobody would lower.
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
    """The folded character, one space where nothing of it belongs to a word, and nothing where it is invisible."""
    if _is_invisible(char):
        return ""
    folded = unicodedata.normalize("NFKC", char)
    for _ in range(2):  # folding can leave what NFKC decomposes further, and the other way round
        folded = unicodedata.normalize("NFKC", folded.casefold())
    folded = "".join(part if _in_word(part) else " " for part in folded if not _is_invisible(part))
    # A spacing accent, which is a symbol or punctuation, decomposes into a space and a mark.
    separates = unicodedata.category(char)[0] in "SP"
    return " " if separates and all(unicodedata.category(part)[0] in "MZ" for part in folded) else folded


def _in_word(char: str) -> bool:
    category = unicodedata.category(char)
    return category[0] in "LMN" or category in ("Co", "Cn")


def _is_invisible(char: str) -> bool:
    return unicodedata.category(char) == "Cf" or any(low <= ord(char) <= high for low, high in _INVISIBLE)


def _may_compose(char: str) -> bool:
    """Combining marks and conjoining jamo: what NFC joins with the character before it, or reorders."""
    return unicodedata.category(char)[0] == "M" or 0x1100 <= ord(char) <= 0x11FF
