"""What a teacher said, and a run of a task, are of one teacher, one vocabulary and one code."""

import numpy as np
import pytest
from flax import nnx

from efftrain import code_identity
from efftrain.compress.task.task_run import Learner, plain_items, task_loss, train_on_task
from efftrain.compress.task.task_teach import teach
from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.data.tasks.items import TaskIds
from efftrain.data.tasks.task import Example, Task
from efftrain.errors import RunError
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.train.config import Training

TEXTS = ["where is my kettle", "cancel the lamp please", "hello", "I want my money", "is the tent sold out", "no"]
EXAMPLES = tuple(Example(text, ("where", "cancel")[i % 2], i) for i, text in enumerate(TEXTS))
TASK = Task(("cancel", "where"), EXAMPLES[:4], EXAMPLES[4:], EXAMPLES[4:], (), {})
SMALL = llama(vocab_size=300, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_length=64, tied_embedding=True)
LEARNER = Learner(model=SMALL, training=Training(steps=1, batch_size=8, length=64))


@pytest.fixture(scope="module")
def ids():
    return TaskIds(train_tokenizer(TEXTS * 3, 270), TASK.labels)


def test_another_teacher_in_the_same_folder_is_asked(ids, tmp_path, capfd, monkeypatch):
    model = Decoder(SMALL.replace(vocab_size=ids.size), rngs=nnx.Rngs(0))

    def said():
        return teach(tmp_path, model, ids, TASK, None, length=64, seed=0).logits

    first = said()
    np.testing.assert_array_equal(said(), first)
    assert "again" not in capfd.readouterr().err
    model.norm.scale[...] = model.norm.scale[...] * 3
    second = said()
    assert np.abs(second - first).max() > 0.1
    assert "other options or inputs (teacher: " in " ".join(capfd.readouterr().err.split())
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    said()
    words = " ".join(capfd.readouterr().err.split())
    assert "made with other code (changed since: efftrain); asking the teacher again" in words


def test_a_run_of_a_task_is_of_one_vocabulary_and_one_code(ids, tmp_path, monkeypatch):
    def train(ids: TaskIds):
        items, loss = plain_items(ids, TASK), task_loss(ids, text_weight=0.1)
        return train_on_task(tmp_path / "run", LEARNER, ids, TASK, items, loss)[1]

    first = train(ids)
    assert train(ids) == first
    left = (tmp_path / "run" / "tokenizer.json").read_text()
    other = TaskIds(train_tokenizer([text[::-1] for text in TEXTS] * 3, 270), TASK.labels)
    assert other.size == ids.size
    with pytest.raises(RunError, match=r"another configuration \(made_from\.ids"):
        train(other)
    assert (tmp_path / "run" / "tokenizer.json").read_text() == left
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    with pytest.raises(RunError, match=r"was trained with other code \(changed since: efftrain\)"):
        train(ids)
