import itertools
import json
import operator
from dataclasses import replace

import numpy as np
import pytest

from efftrain import data
from efftrain.data.storage.packing import row
from efftrain.errors import ConfigError, RunError

LENGTH, BATCH = 32, 8


@pytest.fixture
def config(corpus) -> data.LoaderConfig:
    return data.LoaderConfig(corpora=(data.Part(path=corpus.path),), length=LENGTH, batch_size=BATCH, seed=3)


def take(loader, n) -> list[np.ndarray]:
    return [batch["tokens"] for batch in itertools.islice(loader, n)]


def global_batches(config, n, process_count) -> list[np.ndarray]:
    loaders = [data.batches(config, p, process_count) for p in range(process_count)]
    return [np.concatenate([next(loader)["tokens"] for loader in loaders]) for _ in range(n)]


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_the_global_order_does_not_depend_on_the_number_of_processes(config, process_count):
    n = len(data.PackedRows(data.open(config.corpora[0].path), "train", LENGTH)) // BATCH + 5  # into the second epoch
    alone, together = global_batches(config, n, 1), global_batches(config, n, process_count)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_epoch_holds_every_row_once_and_the_next_has_another_order(corpus, config):
    rows = data.PackedRows(corpus, "train", LENGTH)
    n_rows = len(rows)
    stream = np.concatenate(take(data.batches(replace(config, batch_size=1)), 2 * n_rows))
    expected = sorted(rows[r]["tokens"].tolist() for r in range(n_rows))
    first, second = stream[:n_rows].tolist(), stream[n_rows:].tolist()
    assert sorted(first) == sorted(second) == expected
    assert first != second
    assert first != [rows[r]["tokens"].tolist() for r in range(n_rows)]


def test_rows_are_the_pieces_of_the_stream(corpus):
    stream, rows = corpus.tokens("train")[:], data.PackedRows(corpus, "train", LENGTH)
    for r in range(len(rows)):
        expected = row(stream[r * LENGTH : (r + 1) * LENGTH + 1], LENGTH, end_of_text_id=0)
        for name, value in rows[r].items():
            np.testing.assert_array_equal(value, expected[name])
    assert sum(int(rows[r]["mask"].sum()) for r in range(len(rows))) == len(stream) - 1


@pytest.mark.parametrize("processes", [(1, 1), (2, 2), (1, 4), (4, 2)])
def test_resume_is_exact_also_with_another_number_of_processes(config, processes):
    before, after = processes
    uninterrupted = global_batches(config, 9, 1)
    loaders = [data.batches(config, p, before) for p in range(before)]
    for _ in range(5):
        states = [(next(loader), loader.get_state())[1] for loader in loaders]
    state = json.loads(json.dumps(states[-1]))
    resumed = [data.batches(config, p, after) for p in range(after)]
    next(resumed[0])  # a loader that has read ahead must forget it
    for loader in resumed:
        loader.set_state(state)
    for expected in uninterrupted[5:]:
        np.testing.assert_array_equal(np.concatenate([next(loader)["tokens"] for loader in resumed]), expected)


@pytest.mark.parametrize("change", [{"seed": 4}, {"length": 16}, {"batch_size": 4}, {"split": "test"}])
def test_a_position_in_other_data_is_refused(config, change):
    state = data.batches(config).get_state()
    with pytest.raises(RunError, match="another corpus"):
        data.batches(replace(config, **change)).set_state(state)


def test_another_number_of_threads_is_the_same_data(config):
    loader = data.batches(config)
    take(loader, 2)
    other = data.batches(replace(config, threads=1, prefetch=1))
    other.set_state(loader.get_state())
    np.testing.assert_array_equal(take(other, 2), take(loader, 2))


def test_another_seed_is_another_order(config):
    assert np.any(take(data.batches(config), 1)[0] != take(data.batches(replace(config, seed=4)), 1)[0])


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_token_once_in_order(corpus, config, process_count):
    evaluation = replace(config, split="validation", shuffle=False, repeat=False)
    parts = [list(data.batches(evaluation, p, process_count)) for p in range(process_count)]
    whole = [{k: np.concatenate([b[k] for b in local]) for k in local[0]} for local in zip(*parts, strict=True)]
    assert all(batch["tokens"].shape == (BATCH, LENGTH) for batch in whole)
    assert operator.length_hint(data.batches(evaluation, 0, process_count)) == len(whole)
    assert operator.length_hint(data.batches(config), 7) == 7  # endless
    targets = np.concatenate([batch["targets"][batch["mask"]] for batch in whole])
    np.testing.assert_array_equal(targets, corpus.tokens("validation")[1:])
    n_bytes = corpus.token_bytes()[targets].sum()
    assert n_bytes == corpus.splits["validation"]["bytes"]


def test_evaluation_of_a_mixture_sees_both_corpora(tmp_path, config, corpus):
    part = config.corpora[0]
    once = replace(config, split="test", shuffle=False, repeat=False)
    twice = replace(once, corpora=(part, part))
    n_targets = [sum(int(b["mask"].sum()) for b in data.batches(c)) for c in (once, twice)]
    assert n_targets == [corpus.n_tokens("test") - 1, 2 * (corpus.n_tokens("test") - 1)]


@pytest.fixture(scope="module")
def second(tmp_path_factory, corpus, config_for, write_documents):
    """Other documents with the tokenizer of the first corpus."""
    folder = tmp_path_factory.mktemp("second")
    config = config_for(write_documents(folder / "text", seed=7), tokenizer=corpus.path / "tokenizer.json")
    return data.build(config, folder / "out")


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (0.02, 0.18)])
def test_a_mixture_keeps_its_weights(corpus, second, config, weights):
    rows = [{row["tokens"].tobytes() for row in _rows(c)} for c in (corpus, second)]
    assert not rows[0] & rows[1]
    parts = tuple(data.Part(path=c.path, weight=w) for c, w in zip((corpus, second), weights, strict=True))
    (tokens,) = take(data.batches(replace(config, corpora=parts, batch_size=400)), 1)
    counts = [sum(row.tobytes() in known for row in tokens) for known in rows]
    assert sum(counts) == 400
    assert counts[0] == pytest.approx(400 * weights[0] / sum(weights), abs=2)


def _rows(corpus):
    rows = data.PackedRows(corpus, "train", LENGTH)
    return [rows[r] for r in range(len(rows))]


def test_corpora_with_different_tokenizers_are_not_mixed(tmp_path, corpus, config, config_for, write_documents):
    folder = write_documents(tmp_path / "text", n=40, seed=9)
    other = data.build(config_for(folder, vocabulary=280), tmp_path / "out")
    parts = (*config.corpora, data.Part(path=other.path))
    with pytest.raises(ConfigError, match="different tokenizers"):
        data.batches(replace(config, corpora=parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 10**6}, "use a shorter length"),
        ({"batch_size": 0}, "loader.batch_size"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"seed": -1}, r"loader\.seed \(training\.seed of a recipe\)"),
        ({"corpora": ()}, "loader.corpora is empty"),
    ],
)
def test_impossible_configurations_are_named(config, change, message):
    with pytest.raises(ConfigError, match=message):
        data.batches(replace(config, **change))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_must_be_positive(config, weight):
    with pytest.raises(ConfigError, match="must be positive"):
        replace(config, corpora=(data.Part(path=config.corpora[0].path, weight=weight),))


def test_a_batch_that_does_not_divide_is_refused(config):
    with pytest.raises(ConfigError, match="is not divisible by the 3 processes"):
        data.batches(config, 0, 3)
    with pytest.raises(ConfigError, match="not one of 2"):
        data.batches(config, 2, 2)
