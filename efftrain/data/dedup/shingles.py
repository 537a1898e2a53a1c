"""Hashes the word n-grams (shingles) by which texts are compared.

A text is normalised (``normalise.normalise``): case is folded, compatibility forms become plain, invisible characters
are deleted, and all characters except letters, digits and combining marks separate words. In scripts without spaces
(Chinese, Japanese, Thai, Lao, Tibetan, Myanmar, Khmer) each character is a word of its own, so that shingles are
character n-grams; so it is in Korean, whose words are long and change with every particle. This is decided per
character and not by the share of the script in the text, because near duplicates on either side of a limit would share
no shingle. A run of more than 64 bytes is divided into words of 64 bytes, so that text without separators has shingles.

``shingles`` and ``shingle_hash`` define in plain Python what ``shingle_hashes`` computes for many texts at once. The
vectorised form reads words as 64-bit integers in place and runs no Python per word.
"""

import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from efftrain.data.dedup.normalise import normalise

MAX_BYTES = 500_000
"""Bytes of a text that enter its signature; with millions of shingles, unrelated texts would have equal minima."""

_WORD_BYTES = 64
_SEPARATOR = b"   "  # between texts; long enough that no character, even a broken one, extends into the next text
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # the finaliser of splitmix64 (Steele et al. 2014)
_CHUNK = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

_NORMAL = bytes(ord(chr(c).lower()) if c < 0x80 and chr(c).isalnum() else c if c >= 0x80 else 0x20 for c in range(256))

# Characters that are words of their own, as ranges of (first byte, second byte) in UTF-8.
_SPACELESS = (
    (0xE0, 0xE0, 0xB8, 0xBF),  # Thai, Lao, Tibetan
    (0xE1, 0xE1, 0x80, 0x82),  # Myanmar
    (0xE1, 0xE1, 0x9E, 0x9F),  # Khmer
    (0xE3, 0xE9, 0x80, 0xBF),  # kana, Han
    (0xEA, 0xEA, 0xB0, 0xBF),  # Hangul syllables, three ranges
    (0xEB, 0xEC, 0x80, 0xBF),
    (0xED, 0xED, 0x80, 0x9E),
    (0xF0, 0xF0, 0xA0, 0xBF),  # Han beyond the basic plane
)

# glibc returns the top of the heap to the system after each block of texts and faults it in again for the next, which
# takes much of the time. After one larger allocation was freed, it keeps twice as much; no page of this one is touched.
np.empty(16 << 20, np.uint8)


def _position_factors(n: int) -> list[int]:
    """Returns odd factors, one for each position of a word in a shingle, so that the order of words matters."""
    return [_mix((j + 1) * _CHUNK & _MASK) | 1 for j in range(n)]


def _mix(x: int) -> int:
    x = (x ^ x >> 32) * _M1 & _MASK
    return (x ^ x >> 29) * _M2 & _MASK


def words(text: bytes) -> list[bytes]:
    """Returns the normalised words of one UTF-8 text."""
    return _WORD.findall(normalise([text])[0].translate(_NORMAL))


def is_character(word: bytes) -> bool:
    """Returns whether a word is a single character of a script without spaces."""
    return _WORD_CHARACTER.match(word) is not None


def shingles(text: bytes, n: int = 5) -> list[bytes]:
    """Returns the word n-grams of one UTF-8 text, each joined by one space; a shorter text is a single shingle."""
    found = words(text)
    if not found:
        return []
    return [b" ".join(found[i : i + n]) for i in range(max(len(found) - n + 1, 1))]


def shingle_hash(shingle: bytes) -> int:
    """Returns the 32-bit hash of a shingle; as the ``hashfunc`` of datasketch it gives the same signatures as here."""
    return wide_hash(shingle) >> 32


def wide_hash(shingle: bytes) -> int:
    """Returns the 64-bit hash of a shingle, whose upper half is ``shingle_hash``."""
    parts = shingle.split(b" ")
    return _mix(sum(f * _word_hash(word) for f, word in zip(_position_factors(len(parts)), parts, strict=True)) & _MASK)


def _word_hash(word: bytes) -> int:
    result = 0
    for start in range(0, len(word), 8):
        # Shorter chunks are shifted to the top. Words contain no zero byte, so that no two chunks become one number.
        chunk = int.from_bytes(word[start : start + 8].rjust(8, b"\0"), "little")
        result = (result ^ chunk) * _CHUNK & _MASK
        result ^= result >> 32
    return result


def shingle_hashes(
    texts: Sequence[bytes], n: int = 5, max_bytes: int | None = MAX_BYTES
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes the shingles of many texts.

    Args:
      texts: UTF-8. Blocks of about 512 kB are the fastest.
      n: number of words per shingle.
      max_bytes: number of bytes at the beginning of a text that are read, up to the last whole character; None reads
        all.

    Returns:
      hashes: (shingles,) uint32, ``shingle_hash`` of ``shingles(text, n)`` in order, with repetitions.
      offsets: (texts + 1,) int64; the shingles of text i are ``hashes[offsets[i]:offsets[i + 1]]``. A text without
        words has none.
    """
    hashes, offsets = wide_shingle_hashes(texts, n, max_bytes)
    return (hashes >> np.uint64(32)).astype(np.uint32), offsets


def shingle_set(text: bytes, n: int = 5, max_bytes: int | None = None) -> np.ndarray:
    """Returns the set of the shingles of a text for exact comparison, (shingles,) uint64, sorted and distinct.

    Hashes of 32 bits would collide too often. Temporary memory: about 30 bytes per word and 5 per byte of text.
    """
    return distinct(wide_shingle_hashes([text], n, max_bytes)[0])


def distinct(values: np.ndarray) -> np.ndarray:
    """Returns the sorted distinct values, like ``np.unique``, whose hash table is much slower for large arrays."""
    return without_repeats(np.sort(values))


def without_repeats(ordered: np.ndarray) -> np.ndarray:
    """Returns sorted values without repetitions."""
    return ordered[np.diff(ordered, prepend=~ordered[:1]) != 0]


def sha1_hashes(texts: Sequence[bytes], n: int = 5, max_bytes: int | None = MAX_BYTES) -> tuple[np.ndarray, np.ndarray]:
    """Like ``shingle_hashes`` with the default hash of datasketch, for users with an existing index. It is slow."""
    from datasketch.hashfunc import sha1_hash32

    lists = [[sha1_hash32(shingle) for shingle in shingles(cut(text, max_bytes), n)] for text in texts]
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int64)
    return np.array([hash for hashes in lists for hash in hashes], np.uint32), offsets


def cut(text: bytes, max_bytes: int | None) -> bytes:
    """Returns at most ``max_bytes`` bytes of a UTF-8 text, without an incomplete character at the end."""
    if max_bytes is None or len(text) <= max_bytes:
        return text
    end = max_bytes
    while end and text[end] & 0xC0 == 0x80:
        end -= 1
    return text[:end]


def wide_shingle_hashes(texts: Sequence[bytes], n: int, max_bytes: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Like ``shingle_hashes`` with 64 bits: ``wide_hash`` of each shingle, (shingles,) uint64, and offsets."""
    ((_, hashes, offsets),) = ngram_hashes(texts, (n,), max_bytes)
    return hashes, offsets


def ngram_hashes(
    texts: Sequence[bytes], lengths: Collection[int], max_bytes: int | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields (n, hashes, offsets) for several n, with the results of ``wide_shingle_hashes``. Words are hashed once.

    Args:
      texts: UTF-8.
      lengths: numbers of words per n-gram, each at least 1. They are yielded in ascending order without repetitions.
      max_bytes: see ``shingle_hashes``.
    """
    texts = [cut(text, max_bytes) for text in texts]
    joined = _SEPARATOR.join(texts)
    is_ascii = joined.isascii()
    if not is_ascii:
        texts = normalise(texts)
        joined = _SEPARATOR.join(texts)
    joined = joined.translate(_NORMAL) + bytes(8)
    text_starts = np.cumsum([0, *(len(text) + len(_SEPARATOR) for text in texts)], dtype=np.int64)
    starts, ends = _word_bounds(np.frombuffer(joined, np.uint8)[:-8], is_ascii)
    word_hashes = _word_hashes(joined, starts, ends - starts)
    first_words = np.searchsorted(starts, text_starts)
    del starts, ends  # for a text of many megabytes they are the largest arrays
    return _combine(word_hashes, first_words, sorted({*lengths}))


def _word_bounds(text: np.ndarray, is_ascii: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the position of the first byte of each word, and of the byte after its last."""
    is_word = np.zeros(len(text) + 2, bool)  # a separator on either side
    np.not_equal(text, 0x20, out=is_word[1:-1])
    before, after = is_word[:-1], is_word[1:]
    alone = np.empty(0, np.int64) if is_ascii else _spaceless(text)
    if len(alone):
        border = np.zeros(len(text) + 4, bool)
        border[alone] = True
        border[alone + np.where(text[alone] == 0xF0, 4, 3)] = True
        border = border[: len(text) + 1]
        starts, ends = np.flatnonzero(after & (~before | border)), np.flatnonzero(before & (~after | border))
    else:
        bounds = np.flatnonzero(before != after)
        starts, ends = bounds[0::2], bounds[1::2]
    lengths = ends - starts
    if not len(lengths) or lengths.max() <= _WORD_BYTES:
        return starts, ends
    pieces = (lengths + (_WORD_BYTES - 1)) // _WORD_BYTES
    piece = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    starts = np.repeat(starts, pieces) + piece * _WORD_BYTES
    return starts, np.minimum(starts + _WORD_BYTES, np.repeat(ends, pieces))


def _spaceless(text: np.ndarray) -> np.ndarray:
    """Returns the positions of the characters that are words of their own."""
    leads = np.flatnonzero(text[:-2] >= 0xE0)
    first, second = text[leads], text[leads + 1]
    hits = np.zeros(len(leads), bool)
    for low, high, second_low, second_high in _SPACELESS:
        hits |= (first >= low) & (first <= high) & (second >= second_low) & (second <= second_high)
    return leads[hits]


def _word_hashes(joined: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    # A view of the eight bytes at every position as overlapping integers, without a copy.
    chunks = np.ndarray((len(joined) - 7,), "<u8", joined, strides=(1,))
    result = _add_chunk(np.uint64(0), chunks[starts], lengths)
    for done in range(8, _WORD_BYTES, 8):
        rows = np.flatnonzero(lengths > done)
        if not len(rows):
            break
        result[rows] = _add_chunk(result[rows], chunks[starts[rows] + done], lengths[rows] - done)
    return result


def _add_chunk(result: np.ndarray | np.uint64, chunk: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Applies one round of ``_word_hash`` to many words; ``left`` is the number of bytes left in each word."""
    chunk <<= _SHIFTS[left]
    chunk ^= result
    chunk *= np.uint64(_CHUNK)
    chunk ^= chunk >> np.uint64(32)
    return chunk


_SHIFTS = np.array([8 * (8 - min(left, 8)) for left in range(_WORD_BYTES + 1)], np.uint64)


def _combine(
    word_hashes: np.ndarray, first_words: np.ndarray, lengths: Sequence[int]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yields the n-grams at every word except those that extend into the next text. Sums for n are reused for n + 1."""
    n_words = np.diff(first_words)
    begin, end = first_words[:-1], first_words[1:]
    factors = np.array(_position_factors(max(lengths)), np.uint64)
    sums = word_hashes * factors[0]
    whole = np.zeros(len(n_words), np.uint64)  # the sum over all words of each text that is shorter than n
    whole[n_words == 1] = sums[begin[n_words == 1]]
    keep = np.ones(len(sums), bool)
    done = 1
    for n in lengths:
        for j in range(done, n):
            sums[: max(len(sums) - j, 0)] += word_hashes[j:] * factors[j]
            keep[end[n_words >= j] - j] = False
            if len(ending := np.flatnonzero(n_words == j + 1)):
                whole[ending] = sums[begin[ending]]
        done = n
        offsets = np.concatenate([[0], np.cumsum(np.where(n_words, np.maximum(n_words - n + 1, 1), 0))])
        if len(short := np.flatnonzero((n_words > 0) & (n_words < n))):
            keep[begin[short]] = True
            hashes = sums[keep]
            keep[begin[short]] = False
            hashes[offsets[short]] = whole[short]
        else:
            hashes = sums[keep]
        hashes ^= hashes >> np.uint64(32)
        hashes *= np.uint64(_M1)
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(_M2)
        yield n, hashes, offsets.astype(np.int64)


_ALONE = b"|".join(b"[\\x%02x-\\x%02x][\\x%02x-\\x%02x]" % bounds + b"." * (bounds[0] == 0xF0) for bounds in _SPACELESS)
_WORD_CHARACTER = re.compile(_ALONE, re.DOTALL)
_WORD = re.compile(rb"(?:%s).|(?:(?!%s)[^ ]){1,64}" % (_ALONE, _ALONE), re.DOTALL)
