import pickle
from pathlib import Path

import numpy as np
import pytest

from efftrain.data.decontamination.decontaminate import (
    Decontaminate,
    EvaluationSet,
    contamination,
    document_counts,
    hash_blocks,
    index_evaluation_set,
    ngram_length,
    seen_in_training,
)
from efftrain.data.decontamination.ngram_index import NgramIndex, hits
from efftrain.data.decontamination.readings import readings
from efftrain.data.dedup.shingles import shingles, wide_hash, words
from efftrain.data.sources.json import JsonLines
from efftrain.data.sources.text import TextFolder
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


def test_a_process_that_loads_an_index_computes_nothing(tmp_path):
    """Neither the hashes are read nor the table of their upper bits is built: both are mapped, for every item anew."""
    NgramIndex.build([random_hashes(np.random.default_rng(0), 100_000)]).save(tmp_path / "index.npy")
    index = NgramIndex.load(tmp_path / "index.npy")
    mapped = [array for array in vars(index).values() if isinstance(array, np.ndarray)]
    assert sorted(array.dtype.name for array in mapped) == ["bool", "uint64"]
    assert all(isinstance(array, np.memmap) for array in mapped)
    assert (hits(index, index.hashes[:100]) == np.arange(100)).all()
    (tmp_path / "index.occupied.npy").unlink()
    with pytest.raises(CorpusError, match=r"index\.npy cannot be read"):
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
    index = index_evaluation_set(EvaluationSet(name="quiz", source=source), Decontaminate())
    assert (index.n, index.lengths) == (13, (13,))
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
    assert (shares > config.threshold).tolist() == [False, False, True, True]


def test_a_held_out_document_that_was_trained_on_goes_and_one_with_a_licence_stays():
    rng = np.random.default_rng(3)
    licence = sentence(rng, 60)
    held_out = [sentence(rng, 200), licence + " " + sentence(rng, 100), sentence(rng, 100)]
    training = [licence + " " + sentence(rng, 50) for _ in range(30)]
    training.append(sentence(rng, 30) + " " + " ".join(held_out[0].split()[:100]))  # half of the first
    training.append(" ".join(held_out[2].split()[:20]))  # a fifth of the third's words, less of its n-grams
    config = Decontaminate()
    blocks = list(hash_blocks([text.encode() for text in held_out], config.held_out_n))
    index = NgramIndex.build(hashes for hashes, _ in blocks)
    totals = np.zeros(len(index), np.int64)
    for hashes, offsets in hash_blocks([text.encode() for text in training], config.held_out_n):
        positions, counts = document_counts(hits(index, hashes), offsets)
        totals[positions] += counts
    seen = seen_in_training(index, totals, config.common)
    (block,) = blocks
    shares = contamination(*block, seen)
    assert shares.tolist() == pytest.approx([88 / 188, 0.0, 8 / 88])
    assert (shares > config.held_out_threshold).tolist() == [True, False, False]
    all_seen = seen_in_training(index, totals, common=1000)
    assert contamination(*block, all_seen)[1] == pytest.approx(48 / 148)


def test_blocks_hold_every_text_once():
    texts = [b"word " * n for n in (1, 40_000, 3, 60_000, 60_000, 2)]
    blocks = list(hash_blocks(texts, 1))
    assert [np.diff(offsets).tolist() for _, offsets in blocks] == [[1, 40_000, 3, 60_000], [60_000], [2]]
    assert [len(hashes) for hashes, _ in blocks] == [100_004, 60_000, 2]
    assert list(hash_blocks([], 13)) == []


def _folder(path: Path, texts: list[bytes]) -> EvaluationSet:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number}.txt").write_bytes(text)
    return EvaluationSet(name="quiz", source=TextFolder(path=path))


def test_an_evaluation_set_that_would_protect_nothing_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="'quiz' has no words"):
        index_evaluation_set(_folder(tmp_path / "empty", [b"", b" ... "]), Decontaminate())
    with pytest.raises(CorpusError, match=r"1\.txt of the evaluation set 'quiz' cannot be read"):
        index_evaluation_set(_folder(tmp_path / "broken", [b"a b c", b"\xff"]), Decontaminate())


def shares_of(texts: list[bytes], index) -> list[float]:
    """The largest share of any length, in plain Python."""
    hashed = [hash_slowly(texts, n) for n in index.lengths]
    return np.max([contamination(*of_length, index.ngrams) for of_length in hashed], axis=0).tolist()


def test_a_short_question_is_looked_for_as_a_whole(tmp_path):
    """At 5 to 8 words of its own; what shares all but its first or last word is another text."""
    question = b"who wrote the first novel about whales and seas"
    texts = [question, b"name seven rivers in old Europe", b"what is the meaning of love"]
    found = index_evaluation_set(_folder(tmp_path / "set", texts), Decontaminate(n=13))
    assert (found.documents, found.short, found.n, found.lengths) == (3, 0, 13, (6, 9))
    training = [
        b"tell me, WHO wrote the first Novel about whales and seas? nobody knows",
        b"who wrote the first novel about whales and ships",
        b"then he wrote the first novel about whales and seas",
        b"name seven rivers in old Europe",
        b"name seven rivers in new Europe",
    ]
    assert [share > 0 for share in shares_of(training, found)] == [True, False, False, True, False]


def test_too_short_documents_of_an_evaluation_set_are_counted_and_condemn_no_phrase(tmp_path):
    words = b"a b c d e f g h i j k l m n"
    config = Decontaminate(n=13)
    found = index_evaluation_set(_folder(tmp_path / "set", [words, b"What is it?", b"", b"yes"]), config)
    assert (found.documents, found.short, found.lengths) == (4, 3, (13,))
    assert len(found.ngrams) == 2 + 1 + 1
    assert shares_of([b"what is IT", b"and what is it", b"yes or no"], found) == [1.0, 0.0, 0.0]
    shortest = index_evaluation_set(
        _folder(tmp_path / "again", [b"What is it?", b"yes"]), Decontaminate(n=13, shortest=3)
    )
    assert (shortest.short, shortest.lengths) == (1, (3, 13))
    assert shares_of([b"and what is it"], shortest) == [0.5]


@pytest.mark.parametrize(
    ("counts", "n"),
    [
        ([40, 50, 60], 13),
        ([3] * 10 + [40] * 90, 8),
        ([10] * 10 + [40] * 90, 10),
        ([10] + [40] * 99, 13),
        ([0, 11, 0], 11),
    ],
)
def test_n_of_a_set_is_the_fifth_percentile_of_its_lengths_from_8_to_13(tmp_path, counts, n):
    """Brown et al. 2020, appendix C; empty texts count for nothing."""
    rng = np.random.default_rng(0)
    texts = [sentence(rng, size).encode() for size in counts]
    assert index_evaluation_set(_folder(tmp_path / "set", texts), Decontaminate()).n == n
    assert index_evaluation_set(_folder(tmp_path / "fixed", texts), Decontaminate(n=12)).n == 12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four", 13),  # too short: no text that goes on has such an n-gram
        ("one two three four five", 5),
        (" ".join(map(str, range(12))), 12),
        (" ".join(map(str, range(30))), 13),
        ("中国的首都是哪", 13),  # seven characters say as much as three and a half words
        ("中国的首都是哪个城市", 10),
        ("中国的首都是哪个城市" * 5, 26),
        ("กรุงเทพมหานคร", 13 * 2),  # the capital of Thailand
        ("กรุงเทพมหานครเป็นเมืองหลวง" * 3, 52),
        ("대한민국의 수도는 어디입니까", 12),
        ("안녕하세요 여러분", 13),
        ("The capital of 中国", 13),
    ],
)
def test_characters_of_scripts_without_spaces_are_parts_of_words(text, expected):
    assert ngram_length(words(text.encode()), 13, 5) == expected


@pytest.mark.parametrize(
    ("text", "others"),
    [
        ("plain text - with <3 & more, 5 < 6", []),
        ("an exam-\nple of it", ["an example of it"]),
        ("an exam\u00ad\n  ple", ["an example"]),
        ("an exam‐ \n> ple", ["an example"]),
        ("überмод-\nель", ["überмодель"]),
        ("1950-\n1960", []),
        ("  1 | who\n  2 | wrote\n\n13. it", ["who\nwrote\n\nit"]),
        (r"who\nwrote \"it\"", ["who\nwrote  it "]),
        (r"who\\nwrote exam-\nple", ["who\nwrote exam-\nple", "who\nwrote example"]),
        (r"caf\u00e9 \ud83d\ude00 \u2019", ["café 😀 ’"]),
        (r"broken \ud83d x", ["broken \ufffd x"]),
        ("who<br/>wrote&nbsp;<b>caf&eacute;</b>", ["who\nwrote\xa0 café "]),
    ],
)
def test_readings_undo_how_a_text_was_set(text, others):
    assert readings(text.encode()) == [text.encode(), *(other.encode() for other in others)]


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", 0), ("shortest", 0), ("threshold", 1.0), ("threshold", -0.1), ("held_out_threshold", 2.0), ("common", 0)],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=rf"decontaminate\.{field} is {value}"):
        Decontaminate(**{field: value})


def test_two_sets_of_one_name_are_refused():
    item = EvaluationSet(name="quiz", source=TextFolder(path=Path("x")))
    with pytest.raises(ConfigError, match="two sets named 'quiz'"):
        Decontaminate(sets=(item, item))


def test_no_hit_is_counted_in_no_document():
    for positions, offsets in (([], [0]), ([], [0, 0]), ([-1, -1], [0, 2])):
        entries, counts = document_counts(np.array(positions, np.int64), np.array(offsets))
        assert (len(entries), len(counts)) == (0, 0)
