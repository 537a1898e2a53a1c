"""Divides long texts into parts, so that the memory and time of a tokenizer are bounded for any document.

The ``tokenizers`` library needs more than 100 bytes of memory for each byte of a text that it encodes, and the time to
train a tokenizer is quadratic in the length of the longest word.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_CHARS = 1 << 18
_WINDOW = 256  # number of characters on each side of a cut whose tokens are compared
_RUN = 1024
_WORD_OR_SPACE = re.compile(r"[^\W_]|\s")

# Conditions on the characters before and after a cut, best first. At the first two, every pre-tokenizer in use also
# splits; at the last one, that of GPT-2 does.
_CUTS: tuple[Callable[[str, str], bool], ...] = (
    lambda before, after: after == " " and not before.isspace(),
    lambda before, after: before.isalnum() and not after.isalnum(),
    lambda before, after: after.isspace() and not before.isspace(),
)


def cut_text(tokenizer: "Tokenizer", text: str, size: int = PART_CHARS) -> tuple[list[tuple[int, int]], bool]:
    """Divides a text into parts of at most ``size`` characters, where the tokenizer itself splits.

    Each cut is before a space, or else at another word boundary. The tokens around the cut are compared with those of
    the undivided text. If they differ, the space at the cut is omitted, which suits tokenizers that add a space before
    every text.

    Returns:
      (start, stop) of each part, and whether the tokens may differ from those of the undivided text, because there was
      no word boundary, as in a line without spaces, or because the tokenizer does not work word by word.
    """
    parts, start, changed = [], 0, False
    while len(text) - start > size:
        stop, found = _place_to_cut(text, start + size - size // 16, start + size)
        skipped = next((n for n in range(2) if found and _same_tokens(tokenizer, text, stop, n)), None)
        parts.append((start, stop))
        start, changed = stop + (skipped or 0), changed or skipped is None
    return [*parts, (start, len(text))], changed


def without_long_runs(text: str) -> Iterator[str]:
    """Yields the text in pieces of at most ``PART_CHARS`` characters, in which no word has 2,048 characters or more."""
    begin = 0
    for start in range(0, len(text), _RUN):
        chunk = text[start : start + _RUN]
        in_a_run = chunk.isspace() or chunk.isalnum() or not _WORD_OR_SPACE.search(chunk)
        if in_a_run or start - begin >= PART_CHARS:
            if begin < start:
                yield text[begin:start]
            begin = start
        if in_a_run:
            yield chunk
            begin = start + len(chunk)
    if begin < len(text):
        yield text[begin:]


def _place_to_cut(text: str, low: int, high: int) -> tuple[int, bool]:
    """Returns the last position after ``low`` and up to ``high`` of the best kind of cut, or (``high``, False)."""
    for cuts in _CUTS:
        for place in range(high, low, -1):
            if cuts(text[place - 1], text[place]):
                return place, True
    return high, False


def _same_tokens(tokenizer: "Tokenizer", text: str, place: int, skipped: int) -> bool:
    """Returns whether the text around a cut has the same tokens as its halves without ``skipped`` spaces at the cut."""
    if skipped and text[place] != " ":
        return False
    before, after = text[place - _WINDOW : place], text[place : place + _WINDOW]
    whole, left, right = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in (before + after, before, after[skipped:])
    )
    return whole == left + right
