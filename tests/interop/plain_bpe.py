"""Tokenizers in plain Python, to compare with: nothing is shared with the library but the entries and merges."""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def byte_characters() -> dict[int, str]:
    """The character for each byte in GPT-2: itself if it can be seen, or one after U+0100."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {byte: chr(byte) for byte in seen}
    hidden = [byte for byte in range(256) if byte not in found]
    return found | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def is_space(char: str) -> bool:
    return char.isspace() and char not in "\x1c\x1d\x1e\x1f"


def is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] == "L"


def is_number(char: str) -> bool:
    return unicodedata.category(char)[0] == "N"


def is_other(char: str) -> bool:
    return not (is_space(char) or is_letter(char) or is_number(char))


def run(text: str, at: int, kind: Callable[[str], bool]) -> int:
    """Returns the end of the run of characters of a kind that begins at ``at``."""
    while at < len(text) and kind(text[at]):
        at += 1
    return at


def gpt2_words(text: str) -> Iterator[str]:
    """Cuts a text as GPT-2 does, one character after another."""
    at = 0
    while at < len(text):
        end = _word_end(text, at)
        yield text[at:end]
        at = end


def _word_end(text: str, at: int) -> int:
    for contraction in _CONTRACTIONS:
        if text.startswith(contraction, at):
            return at + len(contraction)
    start = at + 1 if text[at] == " " else at
    for kind in (is_letter, is_number, is_other):
        if (end := run(text, start, kind)) > start:
            return end
    end = run(text, at, is_space)
    return end if end == len(text) or end == at + 1 else end - 1


def smollm_words(text: str) -> Iterator[str]:
    """Every digit is a word; what lies between them is cut as in GPT-2."""
    start = 0
    for at, char in enumerate(text):
        if is_number(char):
            yield from gpt2_words(text[start:at])
            yield char
            start = at + 1
    yield from gpt2_words(text[start:])


def encode(words: Iterator[str], ids: Mapping[str, int], merges: Sequence[str]) -> list[int]:
    """Encodes words: the pair that was merged first in training is merged first, everywhere in a word."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    characters = byte_characters()

    @cache
    def word(text: str) -> list[int]:
        parts = [characters[byte] for byte in text.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(pair, len(ranks)) for pair in pairwise(parts)]
            if (best := min(pairs)) == len(ranks):
                break
            at = pairs.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [ids[part] for part in parts]

    return [number for text in words for number in word(text)]


def sentence_piece(text: str, scores: Mapping[str, float]) -> list[str]:
    """Merges the neighbours whose piece has the best score, the leftmost of equals; unknown characters are bytes."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [scores.get(one + other, -1e9) for one, other in pairwise(parts)]
        if not pairs or (best := max(pairs)) == -1e9:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [
        piece
        for part in parts
        for piece in ([part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()])
    ]
