"""Scores of documents against each document by itself, and the table and the rule that keep by them."""

import math
from functools import partial

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx
from tiny_runs import write_run

from efftrain.config import from_json, to_json
from efftrain.data.documents import Document, Skipped, Text
from efftrain.data.rules.base import scoring
from efftrain.data.rules.score_table import ScoreTable, quantile_thresholds
from efftrain.data.storage.tokenizer import tokenizer_json, train_tokenizer
from efftrain.errors import ConfigError, CorpusError
from efftrain.measure.quality import document_scores as module
from efftrain.measure.quality.document_scores import (
    DocumentScore,
    document_scores,
    pack_windows,
    score_documents,
    write_scores,
)
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder

LENGTH = 12


@pytest.fixture(scope="module")
def tokenizer():
    """Learned on another text than the documents', so that tokens have one byte or several."""
    tokenizer = train_tokenizer(["the rain in spain stays mainly in the plain " * 3], 279)
    assert tokenizer.get_vocab_size() == 279
    return tokenizer


@pytest.fixture(scope="module")
def model():
    config = llama(vocab_size=288, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=LENGTH)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    decoder.head.kernel[...] = decoder.head.kernel[...] * 8  # far from uniform: the documents' scores differ
    return decoder


@pytest.fixture(scope="module")
def documents():
    """Lengths around one and several windows; the empty text; more than one byte a character."""
    rng = np.random.default_rng(0)
    letters = [*"abcdefghij klmn\n", "the ", "rain ", "ü", "数"]
    lengths = [0, 1, 5, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH, 100, *rng.integers(1, 40, 20)]
    return [Document(f"doc/{i}", "".join(rng.choice(letters, size=n)), "made") for i, n in enumerate(lengths)]


@partial(jax.jit, static_argnums=0)
def forward(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def by_hand(model, tokenizer, document, length=LENGTH):
    """One document, one window after the other, log softmax in float64."""
    graph, state = nnx.split(model)
    stream = [0, *tokenizer.encode(document.text).ids]
    nats = 0.0
    for start in range(0, len(stream) - 1, length):
        window = stream[start : start + length + 1]
        row = np.zeros((1, LENGTH), np.int32)  # what stands behind the window is in its future
        row[0, : len(window) - 1] = window[:-1]
        logits = np.asarray(forward(graph, state, row)[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats -= sum(log_p[i, target] for i, target in enumerate(window[1:]))
    n_bytes = len(document.text.encode())
    return DocumentScore(document.id, nats / math.log(2) / n_bytes if n_bytes else None, n_bytes)


def check_equal(found, expected):
    found, expected = list(found), list(expected)
    assert [(s.id, s.n_bytes) for s in found] == [(s.id, s.n_bytes) for s in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.bits_per_byte == (other.bits_per_byte and pytest.approx(other.bits_per_byte, rel=1e-5))


def test_scores_are_those_of_each_document_by_itself(model, tokenizer, documents):
    found = list(document_scores(model, documents, tokenizer, batch_size=4))
    check_equal(found, [by_hand(model, tokenizer, document) for document in documents])
    assert found[0] == DocumentScore("doc/0", None, 0)
    assert np.std([score.bits_per_byte for score in found[1:]]) > 0.1


@pytest.mark.parametrize(("pool_rows", "batch_size"), [(0, 1), (1, 3), (2, 64)])
def test_pools_and_batches_change_nothing(model, tokenizer, documents, monkeypatch, pool_rows, batch_size):
    expected = list(document_scores(model, documents, tokenizer))
    monkeypatch.setattr(module, "POOL_ROWS", pool_rows)
    check_equal(document_scores(model, documents, tokenizer, batch_size=batch_size), expected)


def test_shorter_windows_see_less(model, tokenizer, documents):
    found = list(document_scores(model, documents, tokenizer, length=5))
    check_equal(found, [by_hand(model, tokenizer, document, 5) for document in documents])
    whole = {score.id: score for score in document_scores(model, documents, tokenizer)}
    assert any(
        score.bits_per_byte and abs(score.bits_per_byte - whole[score.id].bits_per_byte) > 1e-3 for score in found
    )


def test_logits_in_chunks_are_the_same(model, tokenizer, documents, monkeypatch):
    expected = list(document_scores(model, documents, tokenizer, batch_size=6))
    chosen = []

    def five(length, elements):  # which does not divide the length
        chosen.append((length, elements))
        return 5

    monkeypatch.setattr(module, "choose_chunks", five)
    module._target_nats.clear_cache()
    check_equal(document_scores(model, documents, tokenizer, batch_size=6), expected)
    assert chosen == [(LENGTH, 6 * LENGTH * 288)]
    module._target_nats.clear_cache()


def test_what_is_no_text_has_no_score(model, tokenizer, documents):
    broken = Document("broken", "half a pair \ud800", "made")
    items = [broken, documents[3], Skipped("gone", "made", "bad_record", "why"), documents[5], broken]
    check_equal(
        document_scores(model, items, tokenizer), [by_hand(model, tokenizer, documents[number]) for number in (3, 5)]
    )
    assert list(document_scores(model, [], tokenizer)) == []


def test_a_file_that_is_lost_ends_the_scoring(model, tokenizer, documents):
    lost = Skipped("crawl.gz@9", "made", "unreadable", "the file ends")
    with pytest.raises(CorpusError, match=r"crawl\.gz@9 of made cannot be read \(the file ends\)"):
        list(document_scores(model, [documents[3], lost], tokenizer))


def test_impossible_arguments_are_refused_before_anything_is_read(model, tokenizer):
    small = Decoder(model.config.replace(vocab_size=257), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match=r"the tokenizer has 279 entries and model\.vocab_size is 257"):
        document_scores(small, [], tokenizer)
    for length in (0, LENGTH + 1):
        with pytest.raises(ConfigError, match=f"length is {length}; it must be from 1 to the model's max_length 12"):
            document_scores(model, [], tokenizer, length=length)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        document_scores(model, [], tokenizer, batch_size=0)


def test_windows_cover_every_target_once_and_fill_their_rows():
    rng = np.random.default_rng(0)
    sizes = [0, 1, 64, 65, 1000, *rng.integers(1, 90, 300).tolist()]
    rows = pack_windows(sizes, 64)
    seen = np.zeros((len(sizes), 1000), int)
    for row in rows:
        assert 0 < sum(size for _, _, size in row) <= 64
        for stream, start, size in row:
            assert start % 64 == 0
            seen[stream, start : start + size] += 1
    for stream, size in enumerate(sizes):
        assert seen[stream].tolist() == [1] * size + [0] * (1000 - size)
    assert len(rows) <= 1.05 * sum(sizes) / 64  # what a window leaves free, others fill
    assert len(pack_windows([64] * 9, 64)) == 9
    assert pack_windows([], 64) == []


class Folderless:
    """What ``score_documents`` asks of a corpus."""

    end_of_text = "<|endoftext|>"

    def __init__(self, documents, tokenizer, path):
        self._documents, self._tokenizer, self.path = documents, tokenizer, path
        (path / "tokenizer.json").write_text(tokenizer_json(tokenizer))
        self.splits = {"train": {"documents": len(documents)}}

    def documents(self, split):
        return iter(self._documents)

    def tokenizer(self):
        return self._tokenizer


def test_table_of_a_split(model, tokenizer, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_WRITE_ROWS", 10)
    path = tmp_path / "scores" / "train.parquet"
    corpus = Folderless(documents, tokenizer, tmp_path)
    run = write_run(tmp_path / "run", model, corpus)
    assert score_documents(run, corpus, "train", path) == len(documents)
    table = pq.read_table(path)
    assert table.schema.names == ["id", "bits_per_byte", "n_bytes"]
    check_equal((DocumentScore(**row) for row in table.to_pylist()), (by_hand(model, tokenizer, d) for d in documents))
    assert [p.name for p in path.parent.iterdir()] == ["train.parquet"]

    rule = ScoreTable.load(path, low=0.0, high=100.0)
    for document in documents[1:]:
        expected = by_hand(model, tokenizer, document).bits_per_byte
        assert rule(Text(document.text, document.id)).score == pytest.approx(expected, rel=1e-5)
    empty = rule(Text("", "doc/0"))
    assert math.isnan(empty.score)
    assert not empty.keep


def test_interrupted_scoring_leaves_no_table(tmp_path):
    def failing():
        yield DocumentScore("a", 1.0, 1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_scores(failing(), tmp_path / "scores.parquet")
    assert not (tmp_path / "scores.parquet").exists()


def table_of(path, scores):
    """scores: list of (id, bits per byte)."""
    write_scores((DocumentScore(id, score, 10) for id, score in scores), path)
    return path


@pytest.fixture
def table(tmp_path):
    """Scores 0 to 99 in another order than the ids."""
    rng = np.random.default_rng(0)
    return table_of(tmp_path / "scores.parquet", [(f"doc {i}", float(s)) for i, s in enumerate(rng.permutation(100))])


def test_rule_keeps_what_lies_between(tmp_path):
    table = table_of(tmp_path / "t.parquet", [("c", 3.0), ("a", 1.0), ("ü", 2.5), ("b", 2.0)])
    rule = ScoreTable.load(table, low=2.0, high=2.5)
    verdicts = {id: rule(Text("", id)) for id in ("a", "b", "c", "ü")}
    assert {id: verdict.score for id, verdict in verdicts.items()} == {"a": 1.0, "b": 2.0, "c": 3.0, "ü": 2.5}
    assert {id for id, verdict in verdicts.items() if verdict.keep} == {"b", "ü"}
    assert verdicts["a"].rule == "score_table/bits_per_byte"


@pytest.mark.parametrize(("low", "high", "kept"), [(0.25, 0.75, 50), (0.5, 1, 50), (0, 0.1, 10), (0, 1, 100)])
def test_quantile_thresholds_keep_their_share(table, low, high, kept):
    thresholds = quantile_thresholds(table, "bits_per_byte", low, high)
    rule = ScoreTable.load(table, low=thresholds[0], high=thresholds[1])
    scores = [verdict.score for i in range(100) if (verdict := rule(Text("", f"doc {i}"))).keep]
    assert len(scores) == kept
    assert min(scores) == round(low * 100)  # the scores are 0 to 99


def test_quantiles_leave_out_documents_without_a_score(tmp_path):
    table = table_of(tmp_path / "t.parquet", [("a", None), ("b", 1.0), ("c", 3.0)])
    assert quantile_thresholds(table, "bits_per_byte", 0.5, 1) == (2.0, 3.0)
    nothing = table_of(tmp_path / "n.parquet", [("a", None)])
    with pytest.raises(CorpusError, match=r"n\.parquet has no score in column 'bits_per_byte'"):
        quantile_thresholds(nothing, "bits_per_byte", 0.5, 1)
    for low, high in ((0.5, 0.5), (-0.1, 1), (0, 1.1), (0.9, 0.1)):
        with pytest.raises(ConfigError, match="are not a range"):
            quantile_thresholds(table, "bits_per_byte", low, high)


def test_unknown_document_is_an_error(table):
    rule = ScoreTable.load(table)
    for id in ("doc 100", "", "doc 5 "):
        with pytest.raises(CorpusError, match=rf"scores\.parquet has no score of document '{id}'"):
            rule(Text("text", id))


def test_other_columns_and_their_types(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "educational": pa.array([4, 1], pa.int64()), "word": ["x", "y"]}), path)
    rule = ScoreTable.load(path, column="educational", low=3)
    assert [rule(Text("", id)).keep for id in "ab"] == [True, False]
    assert rule.name == "score_table/educational"
    with pytest.raises(CorpusError, match="has no column 'bits_per_byte'; it has id, educational, word"):
        ScoreTable.load(path).score(Text("", "a"))
    with pytest.raises(CorpusError, match=r"t\.parquet cannot be read"):
        ScoreTable.load(path, column="word").score(Text("", "a"))
    pq.write_table(pa.table({"id": [1, 2], "educational": [1.0, 2.0]}), path)
    with pytest.raises(CorpusError, match=r"the column 'id' of .*t\.parquet does not hold strings"):
        ScoreTable.load(path, column="educational").score(Text("", "a"))


def test_table_that_is_missing_damaged_replaced_or_ambiguous_is_refused(table):
    rule = ScoreTable.load(table)
    content = table.read_bytes()
    table_of(table, [("doc 1", 1.0), ("doc 2", 1.0), ("doc 1", 2.0)])
    with pytest.raises(CorpusError, match="is not the table the rule was made with"):
        rule.score(Text("", "doc 1"))
    with pytest.raises(CorpusError, match=r"scores\.parquet has 1 repeated ids"):
        ScoreTable.load(table).score(Text("", "doc 1"))
    table.write_bytes(content[: len(content) // 2])
    with pytest.raises(CorpusError, match=r"scores\.parquet cannot be read"):
        ScoreTable.load(table).score(Text("", "doc 1"))
    table.unlink()
    with pytest.raises(CorpusError, match=r"scores\.parquet cannot be read .* score the documents first"):
        ScoreTable.load(table)


def test_limits_are_no_part_of_the_scoring_and_the_content_is(table):
    one, other = ScoreTable.load(table, low=1.0), ScoreTable.load(table, low=2.0, high=3.0)
    assert scoring([one]) == scoring([other])
    assert from_json(to_json(one)) == one
    table_of(table, [("doc 1", 1.0)])
    assert scoring([ScoreTable.load(table, low=1.0)]) != scoring([one])


def test_id_that_is_not_unicode_finds_its_row(model, tokenizer, tmp_path):
    """The name of a badly encoded file."""
    document = Document("name \udce4.txt", "some text", "made")
    write_scores(document_scores(model, [document], tokenizer), tmp_path / "t.parquet")
    rule = ScoreTable.load(tmp_path / "t.parquet")
    assert rule.score(Text(document.text, document.id)) == pytest.approx(
        by_hand(model, tokenizer, document).bits_per_byte, rel=1e-5
    )
