import pickle
from pathlib import Path

import numpy as np
import pytest

from efftrain.data.decontaminate import (
    Decontaminate,
    EvaluationSet,
    NgramIndex,
    contamination,
    document_counts,
    hash_blocks,
    hits,
    index_evaluation_set,
    ngram_hashes,
    seen_in_training,
)
from efftrain.data.json_source import JsonLines
from efftrain.data.shingles import shingles, wide_hash
from efftrain.data.text_source import TextFolder
from efftrain.errors import ConfigError, CorpusError

U64 = np.uint64


def hash_slowly(texts: list[bytes], n: int) -> tuple[np.ndarray, np.ndarray]:
    """The hasher in plain Python, of n-grams as bytes: what the array form computes."""
    lists = [[wide_hash(shingle) for shingle in shingles(text, n)] for text in texts]
    return np.array([hash for hashes in lists for hash in hashes], U64), np.cumsum(
        [0, *map(len, lists)], dtype=np.int64
    )


def random_hashes(rng, n: int) -> np.ndarray:
    return rng.integers(0, 2**64, n, dtype=U64)


def test_an_index_of_many_arrays_is_their_union():
    rng = np.random.default_rng(0)
    pool = np.concatenate([random_hashes(rng, 500), np.array([0, 2**64 - 1], U64)])
    arrays = [rng.choice(pool, size) for size in (0, 1, 300, 7, 0, 90, 2, 2, 200)]
    index = NgramIndex.build(iter(arrays))
    assert index.hashes.dtype == U64
    assert index.hashes.tolist() == sorted(set(np.concatenate(arrays).tolist()))
    assert len(NgramIndex.build([])) == 0
    assert NgramIndex.build([np.array([0, 0], U64)]).hashes.tolist() == [0]


@pytest.mark.parametrize("size", [0, 1, 5, 1000, 70_000])
def test_hits_are_those_of_a_dictionary(size):
    """Among them neighbours of what is in the index, which share its upper bits, and both ends of the range."""
    rng = np.random.default_rng(size)
    index = NgramIndex.build([random_hashes(rng, size)])
    near = index.hashes[: size // 2] + U64(1)
    asked = np.concatenate([index.hashes, near, random_hashes(rng, 300), np.array([0, 2**64 - 1], U64)])
    rng.shuffle(asked)
    place = {hash: number for number, hash in enumerate(index.hashes.tolist())}
    assert hits(index, asked).tolist() == [place.get(hash, -1) for hash in asked.tolist()]
    assert hits(index, np.empty(0, U64)).tolist() == []


def test_the_ends_of_the_range_can_be_in_an_index():
    index = NgramIndex.build([np.array([2**64 - 1, 0, 2**63], U64)])
    assert hits(index, np.array([2**63, 2**64 - 1, 1, 0, 2**64 - 2], U64)).tolist() == [1, 2, -1, 0, -1]


def test_an_index_survives_a_file_and_a_process_border(tmp_path):
    index = NgramIndex.build([random_hashes(np.random.default_rng(0), 100)])
    index.save(tmp_path / "index.npy")
    for other in (NgramIndex.load(tmp_path / "index.npy"), pickle.loads(pickle.dumps(index))):
        np.testing.assert_array_equal(hits(other, index.hashes), np.arange(100))
    content = (tmp_path / "index.npy").read_bytes()
    (tmp_path / "index.npy").write_bytes(content[:-9])
    with pytest.raises(CorpusError, match=r"index\.npy"):
        NgramIndex.load(tmp_path / "index.npy")


def test_contamination_is_the_share_of_a_documents_ngrams():
    """By hand: of 4 n-grams one is there; none; all; no n-gram at all; a repeated one counts twice."""
    index = NgramIndex.build([np.array([10, 20, 30], U64)])
    hashes = np.array([1, 10, 2, 3, 4, 5, 30, 20, 10, 10, 7, 8], U64)
    offsets = np.array([0, 4, 6, 8, 8, 12])
    assert contamination(hashes, offsets, index).tolist() == [0.25, 0.0, 1.0, 0.0, 0.5]
    assert contamination(hashes[:0], np.array([0]), index).tolist() == []
    assert contamination(hashes, offsets, NgramIndex.build([])).tolist() == [0.0] * 5


def test_documents_that_share_an_ngram_are_counted_once_each():
    rng = np.random.default_rng(1)
    index = NgramIndex.build([np.arange(20, dtype=U64) << U64(58)])
    totals, expected = np.zeros(20, np.int64), np.zeros(20, np.int64)
    for _ in range(5):
        documents = [rng.choice(30, rng.integers(0, 40)).astype(U64) << U64(58) for _ in range(7)]
        offsets = np.cumsum([0, *map(len, documents)])
        positions, counts = document_counts(hits(index, np.concatenate(documents)), offsets)
        totals[positions] += counts
        for number in range(20):
            expected[number] += sum(index.hashes[number] in document for document in documents)
    assert totals.tolist() == expected.tolist()
    assert totals.max() > 10


WORDS = [f"w{number}" for number in range(2000)]


def sentence(rng, n: int) -> str:
    return " ".join(rng.choice(WORDS, n))


def test_the_ngram_that_decides_is_found_and_the_one_word_shorter_is_not(tmp_path):
    """13 words of the evaluation set in a row, in other case and punctuation, and 12 of them."""
    rng = np.random.default_rng(2)
    question = sentence(rng, 40)
    (tmp_path / "set.jsonl").write_text(f'{{"text": "{question}"}}\n')
    source = JsonLines(path=tmp_path / "set.jsonl")
    index = index_evaluation_set(EvaluationSet(name="quiz", source=source), 13, hash_slowly)
    quoted = question.split()[5:18]
    training = [
        sentence(rng, 100),
        sentence(rng, 50) + " " + " ".join(quoted[:12]) + " " + sentence(rng, 50),
        sentence(rng, 50) + '\n"' + ", ".join(quoted).upper() + '!" ' + sentence(rng, 50),
        question,
    ]
    hashes, offsets = hash_slowly([text.encode() for text in training], 13)
    shares = contamination(hashes, offsets, index.ngrams)
    assert shares.tolist() == [0.0, 0.0, pytest.approx(1 / (50 + 13 + 50 - 12)), 1.0]
    config = Decontaminate(sets=(EvaluationSet(name="quiz", source=source),))
    assert (shares > config.limit).tolist() == [False, False, True, True]


def test_a_held_out_document_that_was_trained_on_goes_and_one_with_a_licence_stays():
    rng = np.random.default_rng(3)
    licence = sentence(rng, 60)
    held_out = [sentence(rng, 200), licence + " " + sentence(rng, 100), sentence(rng, 100)]
    training = [licence + " " + sentence(rng, 50) for _ in range(30)]
    training.append(sentence(rng, 30) + " " + " ".join(held_out[0].split()[:100]))  # half of the first
    training.append(" ".join(held_out[2].split()[:20]))  # a fifth of the third's words, less of its n-grams
    config = Decontaminate()
    blocks = list(hash_blocks([text.encode() for text in held_out], config.n, hash_slowly))
    index = NgramIndex.build(hashes for hashes, _ in blocks)
    totals = np.zeros(len(index), np.int64)
    for hashes, offsets in hash_blocks([text.encode() for text in training], config.n, hash_slowly):
        positions, counts = document_counts(hits(index, hashes), offsets)
        totals[positions] += counts
    seen = seen_in_training(index, totals, config.common)
    (block,) = blocks
    shares = contamination(*block, seen)
    assert shares.tolist() == pytest.approx([88 / 188, 0.0, 8 / 88])
    assert (shares > config.held_out_limit).tolist() == [True, False, False]
    all_seen = seen_in_training(index, totals, common=1000)
    assert contamination(*block, all_seen)[1] == pytest.approx(48 / 148)


def test_blocks_hold_every_text_once():
    texts = [b"word " * n for n in (1, 40_000, 3, 60_000, 60_000, 2)]
    blocks = list(hash_blocks(texts, 13, lambda held, n: (np.array([len(text) for text in held]), np.array(n))))
    assert [hashes.tolist() for hashes, _ in blocks] == [[5, 200_000, 15, 300_000], [300_000], [10]]
    assert list(hash_blocks([], 13, hash_slowly)) == []


def _folder(path: Path, texts: list[bytes]) -> EvaluationSet:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_bytes(text)
    return EvaluationSet(name="quiz", source=TextFolder(path=path))


def test_an_evaluation_set_that_would_protect_nothing_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="'quiz' has no words"):
        index_evaluation_set(_folder(tmp_path / "empty", [b"", b" ... "]), 13, hash_slowly)
    with pytest.raises(CorpusError, match=r"1\.txt of the evaluation set 'quiz' cannot be read"):
        index_evaluation_set(_folder(tmp_path / "broken", [b"a b c", b"\xff"]), 13, hash_slowly)


def test_short_documents_of_an_evaluation_set_are_counted(tmp_path):
    words = b"a b c d e f g h i j k l m n"
    found = index_evaluation_set(_folder(tmp_path / "set", [words, b"What is it?", b"", b"yes"]), 13, hash_slowly)
    assert (found.documents, found.short) == (4, 3)
    assert len(found.ngrams) == 2 + 1 + 1
    same = hash_slowly([b"what is IT", b"and what is it"], 13)
    assert contamination(*same, found.ngrams).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("limit", 1.0), ("limit", -0.1), ("held_out_limit", 2.0), ("common", 0)]
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"decontaminate\.{field} is {value}"):
        Decontaminate(**{field: value})


def test_two_sets_of_one_name_are_refused():
    item = EvaluationSet(name="quiz", source=TextFolder(path=Path("x")))
    with pytest.raises(ConfigError, match="two sets named 'quiz'"):
        Decontaminate(sets=(item, item))


def test_the_hashes_of_the_pipeline_are_those_of_whole_ngrams():
    texts = ["Eins zwei, drei! vier fünf".encode(), b"", b"one", b"a b c " * 50_000]
    hashes, offsets = ngram_hashes(texts, 3)
    slow_hashes, slow_offsets = hash_slowly(texts, 3)
    assert hashes.dtype == U64
    np.testing.assert_array_equal(offsets, slow_offsets)
    np.testing.assert_array_equal(hashes, slow_hashes)


def test_no_hit_is_counted_in_no_document():
    for positions, offsets in (([], [0]), ([], [0, 0]), ([-1, -1], [0, 2])):
        entries, counts = document_counts(np.array(positions, np.int64), np.array(offsets))
        assert (len(entries), len(counts)) == (0, 0)
