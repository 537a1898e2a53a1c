import hashlib

import numpy as np
import pytest

from efftrain.data.dedup.exact import normalise, survivors, text_digest
from efftrain.data.stages.spool import ExternalSort


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a\nb\n", "a\r\nb"),
        ("a\nb", "a  \n\n\n\tb".replace("\t", "")),
        ("caf\u00e9", "cafe\u0301"),
        ("a\n", "\n\n a".replace(" a", "a")),
    ],
)
def test_what_counts_as_the_same_text(one, other):
    assert text_digest(one) == text_digest(other)


@pytest.mark.parametrize(
    ("one", "other"), [("if x:\n    y", "if x:\n  y"), ("a b", "a  b"), ("A", "a"), ("a\nb", "ab")]
)
def test_what_counts_as_another_text(one, other):
    assert normalise(one) != normalise(other)


def halves(digests: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2).T)


@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_survivor_is_the_first_of_its_text(at_once):
    """Against a dictionary, on digests with many repeats."""
    rng = np.random.default_rng(0)
    digests = [hashlib.blake2b(bytes([n % 256, n // 256]), digest_size=16).digest() for n in rng.integers(0, 400, 2000)]
    first: dict[bytes, int] = {}
    for number, digest in enumerate(digests):
        first.setdefault(digest, number)
    assert survivors(*halves(digests), at_once=at_once).tolist() == [first[d] for d in digests]


@pytest.mark.parametrize("place", [0, 15])
def test_digests_that_differ_in_one_byte_are_not_merged(place):
    digests = [bytes(place) + bytes([last]) + bytes(15 - place) for last in (0, 1, 0)]
    assert survivors(*halves(digests)).tolist() == [0, 1, 0]


def test_no_document_at_all():
    assert survivors(*halves([])).tolist() == []


@pytest.mark.parametrize("memory", [1 << 20, 200])
def test_external_sort_equals_a_stable_sort(tmp_path, memory):
    """With a small memory limit the files are dealt again and again."""
    rng = np.random.default_rng(1)
    keys = [int(k) for k in rng.integers(0, 2**64, 300, dtype=np.uint64)]
    keys += keys[:50] + [7] * 40 + [0, 2**64 - 1]
    items = [(key, f"{number}".encode()) for number, key in enumerate(keys)]
    sort = ExternalSort(tmp_path / "sort", memory=memory)
    for key, payload in items:
        sort.add(key, payload)
    assert list(sort) == [payload for _, payload in sorted(items, key=lambda item: item[0])]
    assert not (tmp_path / "sort").exists()
