"""Shingles by array against plain Python, and what counts as a word."""

import random

import numpy as np
import pytest
from datasketch.hashfunc import sha1_hash32

from efftrain.data.shingles import (
    cut,
    sha1_hashes,
    shingle_hash,
    shingle_hashes,
    shingle_set,
    shingles,
    wide_hash,
    words,
)

PIECES = [
    "a",
    "Zx",
    "hello",
    "_",
    "-",
    " ",
    "\n",
    "\0",
    "é",
    "한",
    "😀",
    "数",
    "据",
    "、",
    "ｱ",
    "ไ",
    "ท",
    "𠀀",
    "ខ",
    "မ",
]
PIECES += ["exactly8", "nineteen characters", "x" * 63, "y" * 64, "z" * 65, "кириллица"]


@pytest.mark.parametrize("n", [1, 2, 5])
def test_arrays_equal_plain_python_on_random_mixtures(n):
    """Also the borders: what stands before or behind a text changes none of its hashes."""
    rng = random.Random(n)
    for _ in range(400):
        lengths = [rng.choice([0, 1, 3, 8, 40]) for _ in range(rng.randrange(6))]
        texts = ["".join(rng.choices(PIECES, k=length)).encode() for length in lengths]
        hashes, offsets = shingle_hashes(texts, n)
        assert hashes.dtype == np.uint32
        assert offsets.dtype == np.int64
        assert len(offsets) == len(texts) + 1
        for text, start, stop in zip(texts, offsets[:-1], offsets[1:], strict=True):
            assert hashes[start:stop].tolist() == [shingle_hash(shingle) for shingle in shingles(text, n)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! foo_bar x2", ["hello", "world", "foo", "bar", "x2"]),
        ("tab\tnull\0del\x7fend", ["tab", "null", "del", "end"]),
        ("Ünï Straße", ["Ünï", "straße"]),
        ("数据ab清", ["数", "据", "ab", "清"]),
        ("ภาษา", list("ภาษา")),
        ("カナ、𠀀x", ["カ", "ナ", "、", "𠀀", "x"]),
        ("한국어 텍스트", ["한국어", "텍스트"]),
        ("q" * 130, ["q" * 64, "q" * 64, "qq"]),
        ("... \n --", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text.encode()) == [word.encode() for word in expected]


def test_shingles_are_runs_of_n_words_and_a_short_text_is_one():
    assert shingles(b"a b c d", 3) == [b"a b c", b"b c d"]
    assert shingles(b"a B", 3) == [b"a b"]
    assert shingles(b"?!", 3) == []


def test_offsets_count_the_shingles_of_each_text():
    _, offsets = shingle_hashes([b"", b"a b c d e f g", b"...", b"a b", b"a b c d e"], 5)
    assert offsets.tolist() == [0, 0, 3, 3, 4, 5]
    assert shingle_hashes([])[1].tolist() == [0]


def test_different_shingles_have_different_hashes():
    """Order, repeats, word borders and the cut of long words all count: 30,000 shingles, no 64-bit collision."""
    rng = random.Random(0)
    alphabet = ["a", "b", "ab", "ba", "aa", "aaaaaaaa", "aaaaaaaaa", "b" * 16, "b" * 17, "c" * 64]
    made = {" ".join(rng.choices(alphabet, k=rng.randrange(1, 7))).encode() for _ in range(80_000)}
    assert len(made) > 30_000
    assert len({wide_hash(shingle) for shingle in made}) == len(made)


def test_hashes_are_uniform():
    """Each bit of consecutive numbers' hashes is set in half of them (five standard deviations)."""
    text = " ".join(map(str, range(20_000))).encode()
    hashes, _ = shingle_hashes([text], 2)
    shares = [np.mean(hashes >> np.uint32(bit) & np.uint32(1)) for bit in range(32)]
    np.testing.assert_allclose(shares, 0.5, atol=5 * 0.5 / len(hashes) ** 0.5)


def test_set_is_sorted_without_repeats_and_agrees_with_the_32_bit_hash():
    text = b"the cat sat on the cat sat on the mat"
    found = shingle_set(text, 2)
    assert found.tolist() == sorted({wide_hash(shingle) for shingle in shingles(text, 2)})
    assert len(found) == 5  # the cat, cat sat, sat on, on the, the mat
    assert set((found >> np.uint64(32)).tolist()) == set(shingle_hashes([text], 2)[0].tolist())


def test_sha1_hashes_are_those_of_datasketch():
    texts = ["One two three", "", "数据 four"]
    hashes, offsets = sha1_hashes([text.encode() for text in texts], 2)
    expected = [b"one two", b"two three", "数 据".encode(), "据 four".encode()]
    assert hashes.tolist() == [sha1_hash32(shingle) for shingle in expected]
    assert offsets.tolist() == [0, 2, 2, 4]


def test_long_text_is_cut_at_a_character():
    text = "ab数据".encode()
    assert [cut(text, n).decode() for n in (0, 1, 2, 3, 4, 5, 7, 8, 9)] == [
        *("", "a", "ab", "ab", "ab", "ab数", "ab数", "ab数据", "ab数据")
    ]
    hashes, _ = shingle_hashes([b"one two three four", b"five"], 1, max_bytes=7)
    assert hashes.tolist() == [shingle_hash(word) for word in (b"one", b"two", b"five")]
    assert len(shingle_hashes([b"w " * 400_000], 1)[0]) == 250_000


def test_one_line_of_megabytes_without_a_separator():
    hashes, _ = shingle_hashes([b"x" * 3_000_000, b"hello"], 5, max_bytes=None)
    assert len(hashes) == 46_875 - 4 + 1  # 3,000,000 / 64 words
    assert hashes[-1] == shingle_hash(b"hello")
