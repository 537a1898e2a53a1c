"""The classifier's features against a count in plain Python, its score by hand, and its file against damage."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest

from efftrain.config import from_json, to_json
from efftrain.data.dedup import shingles as shingles_module
from efftrain.data.dedup.shingles import shingle_hash, shingles
from efftrain.data.documents import Text
from efftrain.data.rules import classifier as classify
from efftrain.data.rules.base import scoring
from efftrain.data.rules.classifier import (
    LinearWeights,
    NgramClassifier,
    ngram_features,
    read_weights,
    write_weights,
)
from efftrain.errors import ConfigError, CorpusError

TEXTS = [
    b"def f(x):\n    return x + x\n",
    b"",
    b"one",
    " ".join(f"word{i % 7} naïve" for i in range(100)).encode(),
    b"  ...  \n",
    "数据 and 数据".encode(),
]


@pytest.fixture
def path(tmp_path):
    """A file of random weights; different tests must not share a name, or they would share what is read once."""
    write_weights(tmp_path / "weights.npz", LinearWeights(random_weights(0), 0.25))
    return tmp_path / "weights.npz"


def random_weights(seed, n_buckets=1 << 10):
    return np.random.default_rng(seed).normal(size=n_buckets).astype(np.float32)


def features_of(text, n_buckets=classify.N_BUCKETS):
    """bucket -> value of one text."""
    buckets, values, offsets = ngram_features([text], n_buckets)
    assert offsets.tolist() == [0, len(buckets)]
    return dict(zip(buckets.tolist(), values.tolist(), strict=True))


def counted(text, n_buckets):
    """The same, word by word in Python integers."""
    counts = Counter()
    for n in (1, 2):
        for shingle in shingles(text, n):
            mixed = (shingle_hash(shingle) + n) * 0x9E3779B1 % 2**32
            counts[mixed * n_buckets // 2**32] += 1
    norm = math.sqrt(sum(count**2 for count in counts.values()))
    return {bucket: count / norm for bucket, count in sorted(counts.items())}


@pytest.mark.parametrize("n_buckets", [2, 64, 1 << 18, 1 << 31])
def test_features_are_the_counts_of_words_and_pairs(n_buckets):
    """Two buckets: everything shares one with something else."""
    for text in TEXTS:
        assert features_of(text, n_buckets) == pytest.approx(counted(text, n_buckets), rel=1e-6)


def test_features_of_three_words_by_hand():
    """a twice, b, "a b", "b a": four buckets, length sqrt(4 + 1 + 1 + 1)."""
    found = sorted(features_of(b"a b a").values())
    assert found == pytest.approx([1 / math.sqrt(7)] * 3 + [2 / math.sqrt(7)])


def test_features_of_many_texts_are_those_of_each():
    buckets, values, offsets = ngram_features(TEXTS)
    for i, text in enumerate(TEXTS):
        here = slice(offsets[i], offsets[i + 1])
        assert dict(zip(buckets[here].tolist(), values[here].tolist(), strict=True)) == features_of(text)
    assert offsets[1] == offsets[2] > 0  # the empty text has none


def test_order_of_words_matters_and_length_of_text_does_not():
    assert features_of(b"alpha beta gamma") != features_of(b"gamma beta alpha")
    once, often = features_of(b"alpha beta " * 1000), features_of(b"alpha beta " * 10_000)
    assert often == pytest.approx(once, rel=1e-2)


def test_number_of_buckets_is_checked():
    for n_buckets in (0, 1, 3, 1000, 1 << 32):
        with pytest.raises(ConfigError, match=f"n_buckets is {n_buckets}; it must be a power of two"):
            ngram_features([b"text"], n_buckets)


def test_score_is_the_logistic_of_the_weighted_features(path):
    weights, rule = random_weights(0), NgramClassifier.load(path)
    for text in TEXTS:
        logit = 0.25 + sum(weights[bucket] * value for bucket, value in counted(text, len(weights)).items())
        assert rule.score(Text(text.decode())) == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)


def test_threshold_is_a_least_score_and_no_part_of_the_scoring(path):
    text = Text(TEXTS[0].decode())
    score = NgramClassifier.load(path).score(text)
    low, high = (NgramClassifier.load(path, threshold=threshold) for threshold in (score, np.nextafter(score, 1)))
    assert low(text).keep
    assert not high(text).keep
    assert scoring([low]) == scoring([high])


def test_other_weights_are_another_scoring(path):
    before = NgramClassifier.load(path)
    write_weights(path, LinearWeights(random_weights(1), 0.25))
    assert scoring([NgramClassifier.load(path)]) != scoring([before])
    write_weights(path, LinearWeights(random_weights(0), 0.5))
    assert scoring([NgramClassifier.load(path)]) != scoring([before])
    write_weights(path, LinearWeights(random_weights(0), 0.25))
    assert scoring([NgramClassifier.load(path)]) == scoring([before])


def test_extreme_weights_saturate_without_overflow():
    for sign in (-1, 1):
        linear = LinearWeights(np.full(4, sign * 1e30, np.float32), 0.0)
        with np.errstate(all="raise", under="ignore"):
            assert linear.probabilities([b"some text"]) == [(sign + 1) / 2]


def test_rule_survives_json_and_pickle(path):
    rule, text = NgramClassifier.load(path, threshold=0.3), Text("some text")
    for copy in (from_json(to_json(rule)), pickle.loads(pickle.dumps(rule))):
        assert copy == rule
        assert copy.score(text) == rule.score(text)


def test_weights_come_back_and_equal_weights_are_equal_files(path, tmp_path):
    linear = read_weights(path)
    assert linear.bias == 0.25
    np.testing.assert_array_equal(linear.weights, random_weights(0))
    write_weights(tmp_path / "again.npz", linear)
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_missing_or_replaced_file_is_refused(path):
    rule = NgramClassifier.load(path)
    write_weights(path, LinearWeights(random_weights(1), 0.25))
    with pytest.raises(CorpusError, match=r"weights\.npz holds other weights than those the rule was made with"):
        rule.score(Text("some text"))
    path.unlink()
    with pytest.raises(CorpusError, match=r"there is no classifier .*weights\.npz"):
        rule.score(Text("some text"))


def test_damage_anywhere_in_the_file_is_found(path):
    """Every 37th byte in turn. Only bytes that carry nothing, such as a date in the archive, may change unnoticed."""
    content = path.read_bytes()
    original = read_weights(path).digest
    refused = 0
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            found = read_weights(path).digest
        except CorpusError:
            refused += 1
        else:
            assert found == original
    assert refused > 0.8 * len(content) / 37
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(CorpusError, match=r"weights\.npz is not a classifier, or damaged"):
            read_weights(path)


def test_other_content_is_refused(path):
    with np.load(path) as file:
        arrays = dict(file)
    for changes, message in (
        ({"format": np.int64(9)}, "classifier format 9"),
        ({"weights": arrays["weights"] + 1}, "another digest"),
        ({"n_buckets": np.int64(7)}, "another digest"),
        ({"probe": arrays["probe"] + 1}, "hashes words differently"),
    ):
        with path.open("wb") as file:
            np.savez(file, **(arrays | changes))
        with pytest.raises(CorpusError, match=message):
            read_weights(path)
    with path.open("wb") as file:
        np.save(file, arrays["weights"])
    with pytest.raises(CorpusError, match="not a classifier"):
        read_weights(path)


def test_changed_hash_of_words_is_noticed(path, monkeypatch):
    """Weights belong to buckets: with another hash every score would be wrong, and still look like one."""
    original = classify.shingle_hashes

    def other(texts, n):
        hashes, offsets = original(texts, n)
        return hashes ^ np.uint32(0x80000000), offsets

    monkeypatch.setattr(classify, "shingle_hashes", other)
    with pytest.raises(CorpusError, match="hashes words differently"):
        read_weights(path)


@pytest.mark.parametrize("step", [lambda texts: list(texts), lambda texts: [text.lower() for text in texts]])
def test_weights_of_words_that_were_normalised_otherwise_are_refused(path, monkeypatch, step):
    """ASCII hashes alike in every version: the file must tell how other characters were read."""
    monkeypatch.setattr(shingles_module, "normalise", step)
    with pytest.raises(CorpusError, match="hashes words differently"):
        read_weights(path)


def test_interrupted_writing_leaves_the_old_file(path, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_weights(path, LinearWeights(random_weights(1), 0.0))
    assert path.read_bytes() == before
