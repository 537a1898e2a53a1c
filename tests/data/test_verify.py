"""Who is removed, for whom, and that it is true; recall on planted near duplicates."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from efftrain.data.dedup.lsh import band_edges, band_hashes, collision_probability, components
from efftrain.data.dedup.minhash import MinHash, document_hashes, signatures
from efftrain.data.dedup.shingles import shingle_set, shingles
from efftrain.data.dedup.verify import Match, containment, jaccard, leaders, screen

CONFIG = MinHash()


def exact(a: bytes, b: bytes) -> float:
    left, right = set(shingles(a)), set(shingles(b))
    return len(left & right) / len(left | right)


def signed(texts: list[bytes], config: MinHash = CONFIG) -> np.ndarray:
    return signatures(*document_hashes(texts, config), config)


def walk(texts: list[bytes], config: MinHash = CONFIG, numbers=None) -> list[Match]:
    """All texts as one component, in their order."""
    numbers = np.arange(len(texts)) if numbers is None else np.array(numbers)
    of = dict(zip(numbers.tolist(), texts, strict=True))
    return leaders(numbers, signed(texts, config), lambda number: shingle_set(of[number], config.shingle), config)


def text_of(rng: random.Random, n: int = 300) -> list[str]:
    return [f"w{rng.randrange(5000)}" for _ in range(n)]


def replaced(rng: random.Random, words: list[str], n: int) -> list[str]:
    words = list(words)
    for place in rng.sample(range(len(words)), n):
        words[place] = f"new{rng.randrange(10**9)}"
    return words


def encoded(words: list[str]) -> bytes:
    return " ".join(words).encode()


def test_similarities_of_sets_by_hand():
    a, b = np.array([1, 3, 5, 7], np.uint64), np.array([3, 4, 7, 9, 11, 2**64 - 1], np.uint64)
    nothing = np.empty(0, np.uint64)
    assert jaccard(a, b) == jaccard(b, a) == 2 / 8
    assert containment(a, b) == 2 / 4
    assert containment(b, a) == 2 / 6
    assert jaccard(nothing, a) == containment(nothing, a) == containment(a, nothing) == jaccard(nothing, nothing) == 0


def test_screen_is_two_standard_deviations_below_the_threshold():
    assert screen(MinHash(threshold=0.8, n_permutations=100, bands=10)) == pytest.approx(0.72)
    assert screen(MinHash(threshold=0.8, similarity="containment")) == 0


def test_planted_near_duplicates_are_found_and_no_removal_is_false():
    """Pairs from Jaccard 0.5 to 1 among unrelated texts, through every step, against sets of shingles in Python."""
    rng = random.Random(0)
    texts, pairs = [], {}
    for _ in range(1200):
        words = text_of(rng)
        texts.append(encoded(words))
        texts.append(encoded(replaced(rng, words, rng.randrange(22))))
        pairs[len(texts) - 2, len(texts) - 1] = exact(texts[-2], texts[-1])
    texts += [encoded(text_of(rng)) for _ in range(1200)] + [b"", b"", b"!"]
    assert sum(s < 0.6 for s in pairs.values()) > 50
    assert sum(0.75 <= s < 0.8 for s in pairs.values()) > 100

    rows = signed(texts)
    numbers = np.arange(len(texts))
    edges = np.concatenate([band_edges(hashes, numbers, 10)[0] for hashes in band_hashes(rows, CONFIG.bands)])
    members, labels = components(edges)
    removed = []
    for label in np.unique(labels):
        of = members[labels == label]
        removed += leaders(of, rows[of], lambda number: shingle_set(texts[number]), CONFIG)

    for match in removed:
        assert match.exact == pytest.approx(exact(texts[match.document], texts[match.survivor]), abs=1e-12)
        assert match.exact >= CONFIG.threshold
    found = {(match.survivor, match.document) for match in removed}
    true = {pair for pair, similarity in pairs.items() if similarity >= CONFIG.threshold}
    assert found <= true
    assert len(found) >= 0.95 * len(true)

    candidates = {(int(label), int(member)) for member, label in zip(members, labels, strict=True) if member != label}
    for low, high in [(0.5, 0.6), (0.6, 0.7), (0.7, 0.8)]:
        chosen = [pair for pair, similarity in pairs.items() if low <= similarity < high]
        expected = np.mean([collision_probability(pairs[pair], CONFIG.bands, CONFIG.rows) for pair in chosen])
        share = np.mean([pair in candidates for pair in chosen])
        assert abs(share - expected) < 4 * (expected * (1 - expected) / len(chosen)) ** 0.5


def test_a_chain_of_small_changes_does_not_drift():
    """Each text is like the one before, the last not like the first: the far ones stay, each removal is near."""
    rng = random.Random(1)
    chain = [text_of(rng)]
    for _ in range(30):
        chain.append(replaced(rng, chain[-1], 4))
    texts = [encoded(words) for words in chain]
    assert all(exact(a, b) > 0.8 for a, b in pairwise(texts))
    assert exact(texts[0], texts[-1]) < 0.2
    matches = walk(texts)
    gone = {match.document for match in matches}
    assert 10 < len(gone) < 30
    for match in matches:
        assert match.survivor not in gone
        assert exact(texts[match.document], texts[match.survivor]) >= CONFIG.threshold


def test_the_first_of_the_order_survives_under_its_own_number():
    rng = random.Random(2)
    words = text_of(rng)
    same, near, other = encoded(words), encoded(replaced(rng, words, 2)), encoded(text_of(rng))
    matches = walk([near, other, same, same], numbers=[70, 3, 11, 5])
    assert [(match.document, match.survivor) for match in matches] == [(11, 70), (5, 70)]
    assert matches[0].exact == pytest.approx(exact(near, same))
    rows = signed([near, same])
    assert matches[0].estimated == pytest.approx(np.mean(rows[0] == rows[1]))
    assert matches[0].bands == sum((rows[0, i : i + 7] == rows[1, i : i + 7]).all() for i in range(0, 112, 7))


def test_the_most_similar_leader_is_the_survivor():
    """The first leader is similar enough too, but the second is nearer."""
    rng = random.Random(3)
    words = text_of(rng)
    first, second = encoded(replaced(rng, words, 12)), encoded(replaced(rng, words, 1))
    config = MinHash(threshold=0.6)
    assert exact(first, second) < 0.75
    matches = walk([first, second, encoded(words)], MinHash(threshold=0.75))
    assert [match.survivor for match in matches] == [1]
    assert [match.document for match in walk([first, encoded(words)], config)] == [1]


def test_threshold_is_reached_at_equality():
    """Six shingles of eight: exactly 0.75."""
    survivor, other = b"a b c d e f g h i j k", b"a b c d e f g h i j x"
    config = MinHash(n_permutations=1120, bands=160)
    assert exact(survivor, other) == 6 / 8
    assert [match.exact for match in walk([survivor, other], config)] == [0.75]


def test_containment_removes_the_part_and_not_the_whole():
    rng = random.Random(4)
    words = text_of(rng)
    whole, part = encoded(words), encoded(words[:180])
    config = MinHash(similarity="containment")
    assert [(match.document, match.exact) for match in walk([whole, part], config)] == [(1, 1.0)]
    assert walk([part, whole], config) == []
    assert walk([whole, part]) == []


def test_an_estimate_alone_removes_nothing():
    """Signatures that agree everywhere, texts that share nothing: what a full collision would look like."""
    rows = np.repeat(signed([encoded(text_of(random.Random(5)))]), 2, axis=0)
    sets = {0: np.arange(10, dtype=np.uint64), 1: np.arange(10, 20, dtype=np.uint64)}
    assert leaders(np.arange(2), rows, sets.__getitem__, CONFIG) == []


def test_many_identical_documents_cost_one_comparison_each():
    rows = np.repeat(signed([encoded(text_of(random.Random(6)))]), 20_000, axis=0)
    calls = Counter()

    def set_of(number: int) -> np.ndarray:
        calls[number] += 1
        return np.arange(300, dtype=np.uint64)

    matches = leaders(np.arange(20_000), rows, set_of, CONFIG)
    assert [match.document for match in matches] == list(range(1, 20_000))
    assert {match.survivor for match in matches} == {0}
    assert all((match.exact, match.estimated, match.bands) == (1, 1, 16) for match in matches)
    assert set(calls.values()) == {1}


def test_many_unrelated_documents_in_one_component_are_compared_with_a_bounded_number():
    """3,000 leaders share one band with all others: no exact comparison, and a true repeat of a late one is found."""
    rng = np.random.default_rng(7)
    rows = rng.integers(0, 1 << 32, (3001, 112), dtype=np.uint32)
    rows[:, :7] = 5
    rows[3000] = rows[2500]
    seen = Counter()

    def set_of(number: int) -> np.ndarray:
        seen[number] += 1
        return np.arange(100, dtype=np.uint64) + np.uint64(1000 * (2500 if number == 3000 else number))

    matches = leaders(np.arange(3001), rows, set_of, CONFIG)
    assert [(match.document, match.survivor) for match in matches] == [(3000, 2500)]
    assert seen.total() == 2


def test_exact_comparisons_are_limited():
    """Ten leaders agree enough by signature; two are compared."""
    rows = np.zeros((11, 112), np.uint32)
    sets = [np.arange(10, dtype=np.uint64) + np.uint64(100 * number) for number in range(11)]
    calls = Counter()

    def set_of(number: int) -> np.ndarray:
        calls[number] += 1
        return sets[number]

    assert leaders(np.arange(11), rows, set_of, CONFIG) == []
    # Each of the later ten once for itself; of the leaders only the first two, once each and then from memory.
    assert calls == {0: 1, 1: 2} | dict.fromkeys(range(2, 11), 1)
