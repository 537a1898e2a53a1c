"""Rows of a task against their definition, and batches that continue to the bit."""

import json

import numpy as np
import pytest

from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.data.tasks.items import TaskIds, completions, conditionals, leave_out, questions
from efftrain.data.tasks.rows import TaskBatches, examples_per_row, fill, pack
from efftrain.data.tasks.task import Example
from efftrain.errors import ConfigError, RunError

TEXTS = ["where is my kettle", "cancel the lamp please", "hello", "I want my money back now", "is the tent sold out"]
LABELS = [0, 1, 2, 0, -1]


@pytest.fixture(scope="module")
def ids():
    return TaskIds(train_tokenizer(TEXTS * 3, 270), ("where", "cancel", "other"))


def batches(ids, **changes):
    options = {"length": 48, "batch_size": 4, "seed": 3, "n_labels": 3, "word_dropout": 0.3} | changes
    return TaskBatches(questions(ids, TEXTS, LABELS, np.eye(5, 3, dtype=np.float32)), **options)


def test_ids_stand_behind_the_tokenizers_and_come_back_from_a_run(ids, tmp_path):
    n = ids.tokenizer.get_vocab_size()
    assert (ids.answer, ids.first_label, ids.size) == (n, n + 1, n + 4)
    ids.write(tmp_path)
    again = TaskIds.read(tmp_path)
    assert again.labels == ids.labels
    assert all((a == b).all() for a, b in zip(again.encode(TEXTS)[3], ids.encode(TEXTS)[3], strict=True))
    with pytest.raises(RunError, match=r"has no labels\.txt"):
        TaskIds.read(tmp_path / "none")


def test_a_question_asks_for_its_label_and_a_conditional_begins_with_it(ids):
    tokens = ids.tokenizer.encode(TEXTS[1], add_special_tokens=False).ids
    asks = questions(ids, TEXTS, LABELS)
    assert asks[1].sequence.tolist() == [0, *tokens, ids.answer, ids.first_label + 1]
    assert asks[1].counted.tolist() == [False, *[True] * len(tokens), False, False]
    assert (asks[1].label, asks[4].label, asks[4].sequence[-1]) == (1, -1, 0)
    made = conditionals(ids, TEXTS[1:2], [1])[0]
    assert made.sequence.tolist() == [0, ids.first_label + 1, *tokens, 0]
    assert made.counted.tolist() == [False, False, *[True] * len(tokens), True]
    assert not made.asks
    done = completions(ids, [Example(TEXTS[1], "ok", 1)])[0]
    ok = ids.tokenizer.encode("ok", add_special_tokens=False).ids
    assert done.sequence.tolist() == [0, *tokens, ids.answer, *ok, 0]
    assert done.counted.tolist() == [False] * (len(tokens) + 2) + [True] * (len(ok) + 1)
    assert leave_out(done, 0.9, np.random.default_rng(0)) is done


def test_words_are_left_out_whole_and_never_all(ids):
    item = questions(ids, TEXTS[3:4], [0])[0]
    seen = set()
    for seed in range(200):
        shorter = leave_out(item, 0.5, np.random.default_rng(seed))
        text = ids.decode(shorter.sequence[1:-2]).split()
        assert text
        assert all(word in TEXTS[3].split() for word in text)
        assert shorter.sequence[0] == 0
        assert shorter.sequence[-2:].tolist() == item.sequence[-2:].tolist()
        assert shorter.counted.sum() == len(shorter.sequence) - 3
        seen.add(len(text))
    assert seen == {1, 2, 3, 4, 5, 6}


def test_a_row_holds_whole_items_side_by_side(ids):
    items = questions(ids, TEXTS, LABELS, np.arange(15, dtype=np.float32).reshape(5, 3)) + conditionals(
        ids, ["hi"], [2]
    )
    length, per_row = 64, 4
    rows = pack(items, length, per_row)
    assert [i for row in rows for i in row] == list(range(6))
    assert all(sum(len(items[i]) for i in row) <= length and len(row) <= per_row for row in rows)
    for row in rows:
        arrays, start = fill([items[i] for i in row], length, per_row, 3), 0
        for place, i in enumerate(row):
            item, here = items[i], slice(start, start + len(items[i]))
            assert arrays["tokens"][here].tolist() == item.sequence[:-1].tolist()
            assert arrays["targets"][here].tolist() == item.sequence[1:].tolist()
            assert arrays["positions"][here].tolist() == list(range(len(item)))
            assert set(arrays["segments"][here]) == {place + 1}
            assert arrays["weights"][here].sum() == pytest.approx(1 if item.asks else 10)
            start += len(item)
            if item.asks:
                assert arrays["tokens"][arrays["answers"][place]] == ids.answer
                assert arrays["answers"][place] == start - 1
                assert arrays["teacher_logits"][place].tolist() == [3 * i, 3 * i + 1, 3 * i + 2]
            else:
                assert arrays["answers"][place] == -1
            assert arrays["labels"][place] == item.label
        assert not arrays["segments"][start:].any()
        assert not arrays["mask"][start:].any()
        assert (arrays["answers"][len(row) :] == -1).all()
        assert ((arrays["weights"] > 0) == arrays["mask"]).all()
    with pytest.raises(ConfigError, match=r"but a row has 8; set training\.length to"):
        pack(items, 8, per_row)


def test_every_epoch_has_every_item_once_in_another_order(ids):
    texts = [f"question number {i}" for i in range(60)]
    items = questions(ids, texts, [i % 3 for i in range(60)])
    endless = TaskBatches(items, length=64, batch_size=1, seed=0, n_labels=3)
    orders = []
    for _ in range(2):
        seen = []
        while len(seen) < 60:
            row = next(endless)
            for place in row["answers"][0][row["answers"][0] >= 0]:
                segment = row["segments"][0] == row["segments"][0][place]
                seen.append(ids.decode(row["tokens"][0][segment][1:-1]))
        assert sorted(seen) == sorted(texts)
        orders.append(seen)
    assert orders[0] != orders[1]
    assert orders[0] != texts


def test_batches_continue_where_they_were(ids):
    whole, other = batches(ids), batches(ids)
    expected = [next(whole) for _ in range(9)]
    for _ in range(4):
        next(other)
    state = json.loads(json.dumps(other.get_state()))
    assert state["epoch"] > 0
    again = batches(ids)
    again.set_state(state)
    for batch in expected[4:]:
        found = next(again)
        assert found.keys() == batch.keys() >= {"tokens", "answers", "teacher_logits"}
        assert all((found[name] == batch[name]).all() and found[name].dtype == batch[name].dtype for name in batch)
    for changes in ({"seed": 4}, {"length": 50}, {"batch_size": 2}, {"word_dropout": 0.2}):
        with pytest.raises(RunError, match="other examples, another seed"):
            batches(ids, **changes).set_state(state)
    with pytest.raises(RunError):
        TaskBatches(questions(ids, TEXTS, LABELS), length=48, batch_size=4, seed=3, n_labels=3).set_state(state)


def test_processes_feed_the_parts_of_one_batch(ids):
    whole, parts = batches(ids), [batches(ids, part=(i, 2)) for i in range(2)]
    for _ in range(5):
        batch, halves = next(whole), [next(part) for part in parts]
        for name in batch:
            np.testing.assert_array_equal(batch[name], np.concatenate([half[name] for half in halves]))
    with pytest.raises(ConfigError, match="is not divisible by the 3 processes"):
        batches(ids, part=(0, 3))


def test_what_cannot_be_trained_on_is_refused(ids):
    with pytest.raises(ConfigError, match="nothing to train on"):
        TaskBatches([], length=8, batch_size=1, seed=0, n_labels=3)
    with pytest.raises(ConfigError, match=r"word_dropout is 1\.0"):
        batches(ids, word_dropout=1.0)
    mixed = questions(ids, TEXTS[:1], [0]) + questions(ids, TEXTS[1:2], [1], np.zeros((1, 3), np.float32))
    with pytest.raises(ConfigError, match="others have none; label all of them"):
        TaskBatches(mixed, length=48, batch_size=1, seed=0, n_labels=3)
    assert examples_per_row(mixed, 4) == 1
    longest = max(len(item) for item in questions(ids, TEXTS))
    with pytest.raises(ConfigError, match=f"set training.length to {longest}"):  # though words are left out at first
        batches(ids, length=longest - 1, word_dropout=0.9)
