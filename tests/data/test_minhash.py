"""Signatures against datasketch."""

import random

import numpy as np
import pytest
from datasketch import MinHash as Datasketch

from efftrain.data.dedup import minhash as module
from efftrain.data.dedup.minhash import EMPTY, MinHash, document_hashes, estimate, minima, permutations, signatures
from efftrain.data.dedup.shingles import shingle_hash, shingles
from efftrain.errors import ConfigError

WORDS = [f"w{i}" for i in range(50)] + ["数据", "über", "a-b", "x" * 100]


def random_texts(seed: int, n: int = 60) -> list[bytes]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.choice([0, 1, 4, 5, 6, 300]))).encode() for _ in range(n)]


@pytest.mark.parametrize(("n_permutations", "bands", "seed", "n"), [(112, 16, 1, 5), (20, 4, 7, 2), (13, 13, 0, 1)])
def test_datasketch_with_our_hash_function_gives_the_same_signatures(n_permutations, bands, seed, n):
    config = MinHash(n_permutations=n_permutations, bands=bands, seed=seed, shingle=n)
    texts = random_texts(seed)
    found = signatures(*document_hashes(texts, config), config)
    assert found.dtype == np.uint32
    for text, row in zip(texts, found, strict=True):
        theirs = Datasketch(num_perm=n_permutations, hashfunc=shingle_hash, seed=seed, scheme="affine32")
        theirs.update_batch(shingles(text, n))
        np.testing.assert_array_equal(row, theirs.hashvalues)


def test_sha1_mode_equals_the_default_of_datasketch():
    config = MinHash(hash="sha1", n_permutations=128)
    texts = random_texts(3, n=20)
    for text, row in zip(texts, signatures(*document_hashes(texts, config), config), strict=True):
        theirs = Datasketch()  # 128 permutations, seed 1, sha1, affine32
        theirs.update_batch(shingles(text, 5))
        np.testing.assert_array_equal(row, theirs.hashvalues)


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 14])
def test_minima_over_blocks_equal_minima_by_hand(block, monkeypatch):
    """Documents that span several blocks, end at a border or fill one exactly."""
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(block)
    sizes = np.array([1, 6, 7, 64, 57, 300, 1, 1, 13])
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    hashes = rng.integers(0, 1 << 32, offsets[-1], dtype=np.uint32)
    a, b = permutations(11, 1)
    found = minima(hashes, offsets, a, b)
    for i in range(len(sizes)):
        for k in range(11):
            mixed = [murmur_finaliser(int(h)) for h in hashes[offsets[i] : offsets[i + 1]]]
            assert found[i, k] == min((int(a[k]) * h + int(b[k])) % 2**32 for h in mixed)


def murmur_finaliser(h: int) -> int:
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return h ^ h >> 16


def test_documents_without_a_shingle_are_all_ones_wherever_they_stand():
    config = MinHash()
    found = signatures(*document_hashes([b"", b"one", b"--", b"two", b""], config), config)
    assert (found == EMPTY).all(axis=1).tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(found[1:2], signatures(*document_hashes([b"one"], config), config))
    assert signatures(*document_hashes([], config), config).shape == (0, 112)


def test_agreement_estimates_jaccard_similarity():
    """Sets of known Jaccard similarity 1/3 and 0.8: the mean over 200 pairs lies within four standard errors."""
    config = MinHash()
    rng = np.random.default_rng(0)
    for shared, own in [(100, 100), (160, 20)]:
        jaccard = shared / (shared + 2 * own)
        agreements = []
        for _ in range(200):
            values = rng.choice(1 << 32, shared + 2 * own, replace=False).astype(np.uint32)
            pair = np.concatenate([values[: shared + own], values[:shared], values[shared + own :]])
            rows = signatures(pair, np.array([0, shared + own, 2 * (shared + own)]), config)
            agreements.append(float(estimate(rows[0], rows[1])))
        error = (jaccard * (1 - jaccard) / config.n_permutations / 200) ** 0.5
        assert abs(np.mean(agreements) - jaccard) < 4 * error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 15}, "minhash.bands is 15, which does not divide minhash.n_permutations 112"),
        ({"bands": 0}, "minhash.bands is 0"),
        ({"threshold": 1.5}, "minhash.threshold is 1.5"),
        ({"shingle": 0}, "minhash.shingle is 0"),
    ],
)
def test_impossible_configuration_says_which_field(change, message):
    with pytest.raises(ConfigError, match=message):
        MinHash(**change)
