"""Shingles by array against plain Python, and what counts as a word."""

import random
import unicodedata

import numpy as np
import pytest
from datasketch.hashfunc import sha1_hash32

from efftrain.data.dedup.normalise import normalise
from efftrain.data.dedup.shingles import (
    cut,
    ngram_hashes,
    sha1_hashes,
    shingle_hash,
    shingle_hashes,
    shingle_set,
    shingles,
    wide_hash,
    wide_shingle_hashes,
    words,
)
from efftrain.data.dedup.verify import jaccard

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
PIECES += ["exactly8", "nineteen characters", "x" * 63, "y" * 64, "z" * 65, "Кириллица", "—", "“", "\u00a0", "\u00ad"]
PIECES += ["\u0301", "ＡＢ", "ß", "İ", "ﬁ", "½", "ﾞ", "ᄒ", "ᅡ", "ᆫ", "한글", "\u093c", "नमस्ते", "¨", "\u200d", "\ue000"]


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
        ("Ünï STRASSE Straße ΣΊΣΥΦΟΣ", ["ünï", "strasse", "strasse", "σίσυφοσ"]),
        ("数据ab清", ["数", "据", "ab", "清"]),
        ("ภาษา", list("ภาษา")),
        ("カナ、𠀀x", ["カ", "ナ", "𠀀", "x"]),
        ("한국어 텍스트", list("한국어텍스트")),
        ("ＡＢＣ１，ﬁne…", ["abc1", "fine"]),
        (
            "don’t — “quote”\u00a0next\u202fone\u3000two\u2028three",
            ["don", "t", "quote", "next", "one", "two", "three"],
        ),
        ("so\u00adft ze\u200bro\u200c\u200d\u2060w\ufeff \u200eltr\u202c", ["soft", "zerow", "ltr"]),
        ("e\u0301cole\u0301 नमस्ते", ["école\u0301".replace("e\u0301", "é"), "नमस्ते"]),
        ("ｶﾞ ガ", ["ガ", "ガ"]),
        ("€5 ☺️ 3°C ¨ ´", ["5", "3", "c"]),
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
    texts = ["One “TWO”\u00a0three", "", "数据 four"]
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


def similarity(a: str, b: str) -> float:
    return jaccard(shingle_set(a.encode()), shingle_set(b.encode()))


RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему; " * 2
ENGLISH = 'He said: "It is a truth universally acknowledged" - and didn\'t wait, or so they say, for "an" answer. '


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RUSSIAN, RUSSIAN.upper()),
        (ENGLISH, ENGLISH.replace(' "', " “").replace('"', "”").replace("'", "’")),
        (ENGLISH, ENGLISH.replace(" - ", "—")),
        (ENGLISH, ENGLISH.replace(" ", "\u00a0")),
        (ENGLISH, "".join(char + "\u00ad" if char in "aeiou" else char for char in ENGLISH)),
        (ENGLISH, "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in ENGLISH)),
        ("今天,天气很好,我们去公园.", "今天，天气很好，我们去公園。".replace("園", "园")),
        (
            "Crème brûlée à la façon de la maison, s'il vous plaît",
            "CRÈME BRÛLÉE A\u0300 LA FAC\u0327ON DE LA MAISON S’IL VOUS PLAÎT",
        ),
        ("efficient office flow of the affluent", "eﬃcient oﬃce ﬂow of the aﬄuent"),
        ("한국어 텍스트를 정규화합니다", unicodedata.normalize("NFD", "한국어 텍스트를 정규화합니다")),
    ],
)
def test_what_a_reader_calls_the_same_has_the_same_shingles(one, other):
    assert one != other
    assert similarity(one, other) == 1


def test_a_changed_particle_costs_a_korean_text_little():
    """One word in 30 gets another ending: by words of five, a fifth of all shingles would change."""
    rng = np.random.default_rng(0)
    text = ["".join(map(chr, rng.integers(0xAC00, 0xD7A4, size))) for size in rng.integers(2, 5, 300)]
    edited = [word[:-1] + "은" if number % 30 == 29 else word for number, word in enumerate(text)]
    assert similarity(" ".join(text), " ".join(edited)) > 0.85


IGNORABLE = {*"\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2065\u3164\uffa0"}
IGNORABLE |= {*map(chr, [*range(0xFE00, 0xFE10), *range(0xFFF0, 0xFFF9), *range(0xE0000, 0xE1000)])}


def normal_words(text: str) -> list[str]:
    """What the docstring of ``normalise`` says, by Python's own functions on the whole text."""
    kind = unicodedata.category
    shown = ""
    for char in text:
        parts = unicodedata.normalize("NFKC", char)
        if kind(char) == "Cf" or char in IGNORABLE:
            continue
        shown += char if kind(char)[0] in "LM" or any(kind(part)[0] in "LNC" for part in parts) else " "
    for _ in range(3):
        shown = unicodedata.normalize("NFKC", shown.casefold())
    shown = "".join(char for char in shown if char not in IGNORABLE)
    return "".join(char if kind(char)[0] in "LMN" or kind(char) in ("Co", "Cn") else " " for char in shown).split()


def test_normalisation_is_pythons_on_every_character_and_on_random_mixtures():
    """Every character but most of the plain letters, each between letters, then random texts."""
    rng = random.Random(0)
    codes = [
        *range(0x80, 0x2600),
        *range(0x3000, 0x3400),
        *range(0xA600, 0xAC10),
        *range(0xE000, 0xE010),
        *range(0xF900, 0x12000),
    ]
    codes += [*range(0x16000, 0x17000, 7), *range(0x1B000, 0x20010), *range(0x2F800, 0x2FA20), *range(0xE0000, 0xE0200)]
    common = [*range(0x20, 0x600), *range(0x900, 0x980), *range(0xE00, 0xE60), *range(0x1100, 0x1200)]
    common += [*range(0x2000, 0x2070), *range(0x3040, 0x3100), *range(0xAC00, 0xAC40), *range(0xFF00, 0xFFF0)]
    texts = [f"a{chr(code)}b" for code in codes]
    for pool in (common, codes):
        # Not the Greek iota subscript: it becomes a letter, which the marks after it then belong to.
        chars = [char for char in map(chr, pool) if "\u0345" not in unicodedata.normalize("NFKD", char)]
        texts += ["".join(rng.choices(chars, k=rng.randrange(60))) for _ in range(600)]
    for text, found in zip(texts, normalise([text.encode() for text in texts]), strict=True):
        if not text.isascii():
            assert found.lower().decode().split() == normal_words(text), ascii(text)


def test_normalising_again_changes_nothing_and_neighbours_do_not_matter():
    rng = random.Random(1)
    texts = ["".join(rng.choices(PIECES, k=40)).encode() for _ in range(300)]
    texts += [b"", b"\0", "\0é\0".encode(), "é".encode()[:1], b"\xff\xfe", "한".encode()[:2], "E\u0301x".encode()]
    found = [words(text) for text in texts]
    assert [words(text) for text in normalise(texts)] == found
    assert [words(text) for text in normalise(normalise(texts))] == found
    assert found[-7:] == [[], [], ["é".encode()], [], [], [], ["éx".encode()]]


@pytest.mark.parametrize(
    "piece", ["E\u0301e ", "Straße ", "Да—нет ", "so\u00adft ", "plain English E\u0301 " + 40 * "w "]
)
def test_a_long_text_is_normalised_as_its_parts_are(piece):
    """Also where an accent, or what becomes several characters, lies on the border between two blocks."""
    n = 400_000 // len(piece)
    assert words((piece * n).encode()) == words(piece.encode()) * n


def test_ascii_hashes_are_those_of_earlier_versions():
    """Computed at commit 4f30595: signatures of ASCII texts that were kept elsewhere stay valid."""
    assert shingle_hashes([b"The quick brown Fox, jumps_over the lazy-dog 42 times!"], 5)[0].tolist() == [
        4105888578,
        2799155712,
        3958374230,
        3779481568,
        1504067647,
        2165939768,
        1945552951,
    ]


def test_several_lengths_at_once_are_each_length_alone():
    rng = random.Random(2)
    texts = ["".join(rng.choices(PIECES, k=rng.choice([0, 1, 2, 5, 30]))).encode() for _ in range(200)]
    found = list(ngram_hashes(texts, (7, 1, 3, 13, 3)))
    assert [n for n, *_ in found] == [1, 3, 7, 13]
    for n, hashes, offsets in found:
        alone, bounds = wide_shingle_hashes(texts, n)
        assert bounds.tolist() == offsets.tolist()
        assert alone.tolist() == hashes.tolist()
        for text, start, stop in zip(texts, offsets[:-1], offsets[1:], strict=True):
            assert hashes[start:stop].tolist() == [wide_hash(shingle) for shingle in shingles(text, n)]
