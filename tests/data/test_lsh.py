"""Bands, buckets and components against brute force."""

from collections import defaultdict
from itertools import combinations

import numpy as np
import pytest

from efftrain.data.dedup.lsh import NO_BAND, band_edges, band_hashes, collision_probability, components
from efftrain.data.dedup.minhash import EMPTY


def few_valued(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Signatures of few values, so that many bands agree."""
    return np.random.default_rng(seed).integers(0, 3, (n, k)).astype(np.uint32)


def reachable(edges: np.ndarray) -> dict[int, int]:
    """Smallest number that a document is connected with, by relaxing edges until nothing changes."""
    label = {int(number): int(number) for number in edges.ravel()}
    changed = True
    while changed:
        changed = False
        for a, b in edges.tolist():
            low = min(label[a], label[b])
            changed |= label[a] != low or label[b] != low
            label[a] = label[b] = low
    return label


@pytest.mark.parametrize("n", [300, 5000])
def test_band_hashes_agree_where_the_rows_of_the_band_agree_and_nowhere_else(n):
    """5,000 documents are more than one block."""
    signatures = few_valued(n, 12)
    hashes = band_hashes(signatures, bands=4)
    assert hashes.shape == (4, n)
    names = [[(band, row[3 * band : 3 * band + 3].tobytes()) for row in signatures] for band in range(4)]
    pairs = {(name, int(hashes[band, i])) for band in range(4) for i, name in enumerate(names[band])}
    # One hash for a name, one name for a hash, also between bands.
    assert len(pairs) == len({name for name, _ in pairs}) == len({hash for _, hash in pairs})


def test_salt_separates_sources():
    signatures = np.tile(few_valued(1, 8), (4, 1))
    salt = np.array([7, 9, 7, 0], np.uint64)
    hashes = band_hashes(signatures, 2, salt)
    assert (hashes[:, 0] == hashes[:, 2]).all()
    assert len(set(hashes[0].tolist())) == 3
    assert (hashes[:, 3] == band_hashes(signatures, 2)[:, 3]).all()


def test_documents_without_a_shingle_share_no_bucket():
    signatures = few_valued(6, 8)
    signatures[[1, 4]] = EMPTY
    hashes = band_hashes(signatures, 2, np.arange(6).astype(np.uint64))
    assert (hashes[:, [1, 4]] == NO_BAND).all()
    assert not (hashes[:, [0, 2, 3, 5]] == NO_BAND).any()
    edges, stats = band_edges(np.array([NO_BAND, 5, NO_BAND, 5, 6], np.uint64), np.arange(5) * 10, max_bucket=9)
    assert edges.tolist() == [[10, 30]]
    assert stats.documents == 3
    edges, stats = band_edges(np.array([NO_BAND] * 3, np.uint64), np.arange(3), max_bucket=9)
    assert (len(edges), stats.documents, stats.largest) == (0, 0, 0)


def test_edges_join_exactly_the_buckets():
    """n - 1 edges for n documents, and the same components as all pairs."""
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 400, 500).astype(np.uint64)
    numbers = rng.permutation(10_000)[:500]
    buckets = defaultdict(list)
    for hash, number in zip(hashes.tolist(), numbers.tolist(), strict=True):
        buckets[hash].append(number)
    edges, stats = band_edges(hashes, numbers, max_bucket=4)
    assert len(edges) == sum(len(bucket) - 1 for bucket in buckets.values())
    pairs = np.array([pair for bucket in buckets.values() for pair in combinations(bucket, 2)])
    assert reachable(edges) == reachable(pairs)
    sizes = [len(bucket) for bucket in buckets.values()]
    assert stats.documents == 500
    assert stats.buckets == sum(size > 1 for size in sizes)
    assert stats.largest == max(sizes)
    assert stats.oversized == sum(size > 4 for size in sizes) > 0


def test_edges_do_not_depend_on_the_order_of_the_entries():
    rng = np.random.default_rng(2)
    hashes, numbers = rng.integers(0, 50, 200).astype(np.uint64), np.arange(200)
    shuffled = rng.permutation(200)
    first, _ = band_edges(hashes, numbers, 10)
    second, _ = band_edges(hashes[shuffled], numbers[shuffled], 10)
    assert sorted(first.tolist()) == sorted(second.tolist())


@pytest.mark.parametrize("hashes", [[], [3], [3, 4]])
def test_no_bucket_gives_no_edge(hashes):
    edges, stats = band_edges(np.array(hashes, np.uint64), np.arange(len(hashes)), max_bucket=10)
    assert edges.shape == (0, 2)
    assert (stats.documents, stats.buckets, stats.largest) == (len(hashes), 0, min(len(hashes), 1))


def test_everything_in_one_bucket():
    edges, stats = band_edges(np.zeros(50_000, np.uint64), np.arange(50_000), max_bucket=10_000)
    assert len(edges) == 49_999
    assert (stats.largest, stats.oversized) == (50_000, 1)
    members, labels = components(edges)
    assert (members == np.arange(50_000)).all()
    assert (labels == 0).all()


@pytest.mark.parametrize("n_edges", [1, 30, 150, 400])
def test_components_are_those_of_brute_force(n_edges):
    """From single pairs to one giant component; numbers far apart, edges repeated and in both directions."""
    rng = np.random.default_rng(n_edges)
    edges = rng.choice(np.arange(200) * 5 + 3, (n_edges, 2)).astype(np.int64)
    edges = np.concatenate([edges, edges[:5, ::-1]])
    members, labels = components(edges)
    assert dict(zip(members.tolist(), labels.tolist(), strict=True)) == reachable(edges)
    assert (np.diff(members) > 0).all()


def test_no_edges_touch_no_document():
    members, labels = components(np.empty((0, 2), np.int64))
    assert len(members) == len(labels) == 0
    assert members.dtype == labels.dtype == np.int64


def test_collision_probability_is_that_of_random_signatures():
    """Each value agrees with probability s; 20,000 pairs, four standard errors. And two values by hand."""
    assert collision_probability(0.5, bands=2, rows=1) == pytest.approx(0.75)
    assert collision_probability(0.75, bands=14, rows=8) == pytest.approx(0.772, abs=5e-4)
    rng, n = np.random.default_rng(3), 20_000
    for s in (0.6, 0.75):
        left = rng.integers(0, 1 << 32, (n, 112), dtype=np.uint32)
        right = np.where(rng.random((n, 112)) < s, left, left + np.uint32(1))
        found = (band_hashes(left, 16) == band_hashes(right, 16)).any(axis=0).mean()
        expected = collision_probability(s, 16, 7)
        assert abs(found - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
