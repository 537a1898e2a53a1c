"""Exact deduplication of normalised text."""

import hashlib
import unicodedata

import numpy as np


def normalise(text: str) -> str:
    """What counts as the same text: newline style, trailing space, blank lines and Unicode composition do not matter.

    Indentation does: in Python it is meaning.
    """
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return "\n".join(line for line in map(str.rstrip, composed.splitlines()) if line)


def text_digest(text: str) -> bytes:
    """16 bytes (blake2b) of the normalised text.

    At 10^9 documents a chance collision has probability 10^-21.
    """
    return hashlib.blake2b(normalise(text).encode(), digest_size=16).digest()


def survivors(high: np.ndarray, low: np.ndarray, *, at_once: int = 1 << 22) -> np.ndarray:
    """For each document the number of the first with the same digest: its own, if it survives.

    Args:
      high, low: (documents,) uint64, the halves of the digests.
      at_once: about how many documents are sorted together, which bounds the memory beside the arguments.

    Returns:
      (documents,) int64.
    """
    result = np.arange(len(high), dtype=np.int64)
    n_parts = -(-len(high) // at_once)
    part_of = low % np.uint64(max(n_parts, 1))
    for part in range(n_parts):
        numbers = np.flatnonzero(part_of == part)
        # The sort is stable, so the first document comes in front of its repeats.
        numbers = numbers[np.lexsort((low[numbers], high[numbers]))]
        before, after = numbers[:-1], numbers[1:]
        is_first = np.ones(len(numbers), bool)
        is_first[1:] = (high[before] != high[after]) | (low[before] != low[after])
        result[numbers] = numbers[is_first][np.cumsum(is_first) - 1]
    return result
