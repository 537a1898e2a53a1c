"""Long texts in parts, so that a tokenizer's memory and time are bounded whatever a document is.

The ``tokenizers`` library takes more than 100 bytes of memory for each byte of a text that it encodes, and training
takes time that grows with the square of the longest word.
"""

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PART_CHARS = 1 << 18
_WINDOW = 256  # characters on each side of a cut whose tokens are compared
_RUN = 1024
_WORD_OR_SPACE = re.compile(r"[^\W_]|\s")

# Where to cut, best first: between the character before and the one after. The first two are cuts of every
# pre-tokenizer in use, the last one also of GPT-2's.
_CUTS: tuple[Callable[[str, str], bool], ...] = (
    lambda before, after: after == " " and not before.isspace(),
    lambda before, after: before.isalnum() and not after.isalnum(),
    lambda before, after: after.isspace() and not before.isspace(),
)


def cut_text(tokenizer: "Tokenizer", text: str, size: int = PART_CHARS) -> tuple[list[tuple[int, int]], bool]:
    """Cuts a text into parts of at most ``size`` characters, where the tokenizer itself cuts.

    Each cut is before a space, or else at another border of a word. Whether the tokens around it are those of the uncut
    text is tried out; for a tokenizer that puts a space before every text, the space at the cut is left out instead.

    Returns:
      (start, stop) of each part, and whether the tokens may differ from those of the whole: because there was no
      place to cut, as in a line without spaces, or because the tokenizer does not work word by word.
    """
    parts, start, changed = [], 0, False
    while len(text) - start > size:
        stop, found = _place_to_cut(text, start + size - size // 16, start + size)
        skipped = next((n for n in range(2) if found and _same_tokens(tokenizer, text, stop, n)), None)
        parts.append((start, stop))
        start, changed = stop + (skipped or 0), changed or skipped is None
    return [*parts, (start, len(text))], changed


def without_long_runs(text: str) -> Iterator[str]:
    """Pieces of a text, none longer than ``PART_CHARS``, in which no word of byte-level BPE has 2,048 characters."""
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
    """The last good place from ``low`` to ``high``; ``high`` and False where there is none."""
    for cuts in _CUTS:
        for place in range(high, low, -1):
            if cuts(text[place - 1], text[place]):
                return place, True
    return high, False


def _same_tokens(tokenizer: "Tokenizer", text: str, place: int, skipped: int) -> bool:
    """Whether the text around a place has the tokens of its two halves, with ``skipped`` spaces at the cut left out."""
    if skipped and text[place] != " ":
        return False
    before, after = text[place - _WINDOW : place], text[place : place + _WINDOW]
    whole, left, right = (
        tokenizer.encode(part, add_special_tokens=False).ids for part in (before + after, before, after[skipped:])
    )
    return whole == left + right
