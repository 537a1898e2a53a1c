"""Distillation for a task: the loss against NumPy, the teacher's opinions, and what it makes up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efftrain.compress.task import task_texts
from efftrain.compress.task.task import TaskLoss, label_divergence, predict
from efftrain.compress.task.task_texts import Augmentation, agreed_answers, answer, majority, synthesise
from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.data.tasks.items import TaskIds, completions, conditionals, questions
from efftrain.data.tasks.rows import TaskBatches
from efftrain.data.tasks.task import Example, same_text
from efftrain.errors import ConfigError
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder
from efftrain.models.vocabulary import with_vocabulary
from efftrain.train.step import accumulate

TEXTS = ["where is my kettle", "cancel the lamp please", "hello", "I want my money", "is the tent sold out", "no"]
LABELS = np.array([0, 1, 2, 0, -1, 1])


@pytest.fixture(scope="module")
def ids():
    return TaskIds(train_tokenizer(TEXTS * 3, 270), ("where", "cancel", "other"))


@pytest.fixture(scope="module")
def model(ids):
    config = llama(vocab_size=ids.size, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=64, tied_embedding=True)
    return Decoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def teacher():
    return np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32) * 2


@pytest.fixture(scope="module")
def batch(ids, teacher):
    items = questions(ids, TEXTS, LABELS, teacher)
    return next(TaskBatches(items, length=64, batch_size=4, seed=0, n_labels=3))


def loss_of(ids, **options):
    return TaskLoss(first_label=ids.first_label, n_labels=3, **options)


def softmax(x):
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


def test_the_loss_is_its_formula(ids, model, batch):
    alpha, temperature, weight = 0.7, 3.0, 0.25
    loss = loss_of(ids, alpha=alpha, temperature=temperature, text_weight=weight)
    total, count, metrics = loss(model, batch, None)
    hidden, _ = model.hidden(batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"])
    logits = np.asarray(model.logits(hidden), np.float64)
    kl = gold = text = 0.0
    n = 0
    for row in range(4):
        for place, label, opinion in zip(
            *(batch[k][row] for k in ("answers", "labels", "teacher_logits")), strict=True
        ):
            if place < 0:
                continue
            said = logits[row, place, ids.first_label : ids.first_label + 3]
            p, q = softmax(opinion / temperature), softmax(said / temperature)
            kl += temperature**2 * (p * np.log(p / q)).sum()
            gold += -np.log(softmax(said)[label]) if label >= 0 else 0.0
            n += 1
        for place in np.flatnonzero(batch["mask"][row]):
            nats = -np.log(softmax(logits[row, place])[batch["targets"][row, place]])
            text += batch["weights"][row, place] * nats
    assert float(count) == n > 6
    assert float(total) == pytest.approx(alpha * kl + (1 - alpha) * gold + weight * text, rel=1e-4)
    found = {name: float(value) for name, (value, _) in metrics.items()}
    assert found["loss/divergence"] == pytest.approx(kl / temperature**2, rel=1e-4)
    assert found["loss/label"] == pytest.approx(gold, rel=1e-4)
    assert float(metrics["loss/label"][1]) == (batch["labels"] >= 0).sum()
    plain, *_ = loss_of(ids, text_weight=0.0)(model, batch, None)
    assert float(plain) == pytest.approx(gold, rel=1e-4)


def test_no_gradient_reaches_the_teacher_and_one_reaches_the_student(ids, model, batch):
    loss, (graph, state) = loss_of(ids, alpha=1.0, text_weight=0.0), nnx.split(model)

    def total(state, logits):
        return loss(nnx.merge(graph, state), dict(batch) | {"teacher_logits": logits}, None)[0]

    of_student, of_teacher = jax.jit(jax.grad(total, argnums=(0, 1)))(state, jnp.asarray(batch["teacher_logits"]))
    assert not np.asarray(of_teacher).any()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(of_student))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_student)) > 1e-4


def test_divergence_is_zero_at_the_teacher_and_its_gradient_does_not_grow_with_temperature():
    teacher = jnp.array([1.0, -2.0, 0.5])
    assert float(label_divergence(teacher + 3.0, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    student = jnp.array([0.1, 0.2, -0.3])
    for temperature in (50.0, 500.0):  # Hinton et al. 2015, equation 4: (z - v) / labels, of logits around 0
        gradient = jax.grad(lambda z, t=temperature: label_divergence(z, teacher, t))(student)
        expected = (student - student.mean() - teacher + teacher.mean()) / 3
        np.testing.assert_allclose(gradient, expected, atol=0.05 if temperature == 50 else 5e-3)


def test_micro_batches_add_up(ids, model, batch):
    loss, (graph, state) = loss_of(ids, alpha=0.5), nnx.split(model)

    def gradient_of(batch, key):
        def total(state):
            value, count, metrics = loss(nnx.merge(graph, state), batch, key)
            return value, (count, metrics)

        (value, (count, metrics)), gradient = jax.value_and_grad(total, has_aux=True)(state)
        return value, count, metrics, gradient

    placed = {name: jnp.asarray(array) for name, array in batch.items()}
    whole, parts = (accumulate(gradient_of, placed, jax.random.key(0), n) for n in (1, 2))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_teacher_is_needed_where_it_has_a_share(ids, model, batch):
    without = {name: array for name, array in batch.items() if name != "teacher_logits"}
    with pytest.raises(ConfigError, match=r"alpha is 0\.5 and the rows have no teacher's logits"):
        loss_of(ids, alpha=0.5)(model, without, None)
    for options, words in (
        ({"alpha": 1.5}, "alpha"),
        ({"temperature": 0}, "temperature"),
        ({"text_weight": -1}, "text"),
    ):
        with pytest.raises(ConfigError, match=words):
            loss_of(ids, **options)


def test_predictions_are_those_of_each_question_alone(ids, model):
    found = predict(model, loss_of(ids), questions(ids, TEXTS), length=40, batch_size=2)
    for text, row in zip(TEXTS, found, strict=True):
        tokens = [0, *ids.encode([text])[0][0], ids.answer]
        logits = model(np.array([tokens], np.int32))[0, -1]
        np.testing.assert_allclose(row, logits[ids.first_label : ids.first_label + 3], atol=2e-5)


def test_new_entries_leave_what_the_model_says_of_the_old(model):
    grown = with_vocabulary(model, model.config.vocab_size + 5, max_length=80, rngs=nnx.Rngs(1))
    tokens = np.random.default_rng(0).integers(0, 270, (2, 9))
    before, after = model(tokens), grown(tokens)
    assert after.shape[-1] == before.shape[-1] + 5
    np.testing.assert_array_equal(after[..., :-5], before)
    assert grown.config.max_length == 80
    assert float(jnp.abs(grown.embedding.table[-5:]).min(axis=-1).max()) > 0
    with pytest.raises(ConfigError, match="entries can only be added"):
        with_vocabulary(model, 4, rngs=nnx.Rngs(1))


def test_only_what_is_new_and_sure_stays(ids, model, monkeypatch):
    """The drawn texts are planted: one of the test, one that is known, repetitions, one without end, one with an id."""

    def tokens(text, *end):
        return np.array([*ids.encode([text])[0][0], *end], np.int32)

    planted = [
        tokens("New  one", 0), tokens("a TEST  text", 0), tokens("hello", 0), tokens("new one", 0),
        tokens("no end"), tokens("odd", ids.answer, 0), tokens("", 0), tokens("unsure", 0), tokens("second", 0),
        tokens("long " * 40, 0), tokens("hello", 0), tokens("hello", 0),
    ]  # fmt: skip
    drawn = [np.pad(t, (0, max(0, 12 - len(t)))) if 0 in t else t for t in planted]
    monkeypatch.setattr(task_texts, "_sample", lambda *_: drawn)

    def opinions(model, loss, items, *, length):
        texts = [ids.decode(item.sequence[1:-2]) for item in items]
        assert texts == ["New  one", "unsure", "second"]
        return np.log(np.array([[0.9, 0.05, 0.05], [0.3, 0.3, 0.4], [0.2, 0.2, 0.6]], np.float32))

    monkeypatch.setattr(task_texts, "predict", opinions)
    options = Augmentation(per_label=4, threshold=0.5)
    made = synthesise(model, ids, loss_of(ids), options, ["A test text", *TEXTS], length=40, longest=12, seed=0)
    assert made.texts == ["New  one", "second"]
    assert made.labels.tolist() == [0, 2]
    np.testing.assert_allclose(made.logits, np.log([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6]]), rtol=1e-5)
    assert made.counts == {"drawn": 12, "known": 4, "repeated": 1, "cut": 4, "unsure": 1, "kept": 2}


def trained(ids, items, steps=150):
    """A tiny model that has learnt its examples by heart, by plain gradient descent on the text."""
    import optax

    from efftrain.train.objectives.objective import next_token_loss

    config = llama(vocab_size=ids.size, d_model=32, n_layers=2, n_heads=2, d_ff=64, max_length=64, tied_embedding=True)
    graph, state = nnx.split(Decoder(config, rngs=nnx.Rngs(0)))
    batch, optimizer = next(TaskBatches(items, length=64, batch_size=4, seed=0, n_labels=3)), optax.adam(1e-2)

    @jax.jit
    def step(state, moments):
        gradient = jax.grad(lambda s: next_token_loss(nnx.merge(graph, s), batch, None)[0])(state)
        updates, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(state, updates), moments

    moments = optimizer.init(state)
    for _ in range(steps):
        state, moments = step(state, moments)
    return nnx.merge(graph, state)


def test_a_model_that_learnt_its_questions_by_heart_makes_up_none_of_the_test(ids):
    labels = [0, 1, 2, 0, 1]
    model = trained(ids, conditionals(ids, TEXTS[:5], labels))
    options = Augmentation(per_label=20, threshold=0.0, temperature=0.7)
    free = synthesise(model, ids, loss_of(ids), options, [], length=40, longest=24, seed=1)
    assert set(free.texts) & set(TEXTS)  # it does say them
    known = TEXTS[:5]
    made = synthesise(model, ids, loss_of(ids), options, known, length=40, longest=24, seed=1)
    assert not {same_text(t) for t in made.texts} & {same_text(t) for t in known}
    assert len(made.texts) == len({same_text(t) for t in made.texts}) == made.counts["kept"] == len(made.logits)
    assert sum(made.counts.values()) == 2 * made.counts["drawn"] == 120
    again = synthesise(model, ids, loss_of(ids), options, known, length=40, longest=24, seed=1)
    assert again.texts == made.texts


def test_answers_follow_their_prompts(ids):
    pairs = [Example("hello", "no", 1), Example("is the tent sold out", "where", 2), Example("no", "hello", 3)]
    plain = TaskIds(ids.tokenizer)
    model = trained(plain, completions(plain, pairs))
    prompts = [p.text for p in pairs]
    assert answer(model, plain, prompts, longest=10) == [p.answer for p in pairs]
    found, counts = agreed_answers(
        model, plain, prompts, Augmentation(samples=4, temperature=0.3, threshold=0.75), longest=10, seed=0
    )
    assert found == [p.answer for p in pairs]
    assert counts == {"asked": 3, "unsure": 0, "kept": 3}


def test_the_majority_needs_its_share():
    assert majority(["2", "3", "2", "4"], 0.5) == "2"
    assert majority(["2", "3", "2", "4"], 0.6) is None
    assert majority(["", "", "2"], 0.5) is None
    for options, words in (
        ({"per_label": 0}, "per_label"),
        ({"temperature": 0}, "temperature"),
        ({"threshold": 1}, "thr"),
    ):
        with pytest.raises(ConfigError, match=words):
            Augmentation(**options)
