"""Detects exact duplicates of normalised text by their digests."""

import hashlib
import unicodedata

import numpy as np


def normalise(text: str) -> str:
    """Normalises a text, so that newline style, trailing space, blank lines and Unicode composition do not matter.

    Indentation is kept, because it has a meaning in Python.
    """
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return "\n".join(line for line in map(str.rstrip, composed.splitlines()) if line)


def text_digest(text: str) -> bytes:
    """Returns the digest of the normalised text: 16 bytes of blake2b.

    Among 10^9 documents, a chance collision has probability 10^-21.
    """
    return hashlib.blake2b(normalise(text).encode(), digest_size=16).digest()


def survivors(high: np.ndarray, low: np.ndarray, *, at_once: int = 1 << 22) -> np.ndarray:
    """Finds the first document with the same digest for each document.

    Args:
      high, low: (documents,) uint64, the halves of the digests.
      at_once: approximate number of documents that are sorted together, which bounds the memory besides the arguments.

    Returns:
      (documents,) int64, the number of the first document with the same digest; a document's own number if it is kept.
    """
    result = np.arange(len(high), dtype=np.int64)
    n_parts = -(-len(high) // at_once)
    part_of = low % np.uint64(max(n_parts, 1))
    for part in range(n_parts):
        numbers = np.flatnonzero(part_of == part)
        # The sort is stable, so that the first document precedes its duplicates.
        numbers = numbers[np.lexsort((low[numbers], high[numbers]))]
        before, after = numbers[:-1], numbers[1:]
        is_first = np.ones(len(numbers), bool)
        is_first[1:] = (high[before] != high[after]) | (low[before] != low[after])
        result[numbers] = numbers[is_first][np.cumsum(is_first) - 1]
    return result
