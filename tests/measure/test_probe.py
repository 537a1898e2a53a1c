"""A probe against SciPy's optimum, and few-shot scores against the likelihood of whole texts."""

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.optimize import minimize

from efftrain.data.storage.tokenizer import train_tokenizer
from efftrain.errors import ConfigError
from efftrain.measure.quality.few_shot import NO_CONTENT, few_shot
from efftrain.measure.quality.probe import fit_probe, frozen_features, logistic_regression
from efftrain.measure.quality.task_scores import accuracy, log_softmax
from efftrain.models.config import llama
from efftrain.models.decoder import Decoder

WORDS = ["where is my lamp", "cancel it now", "my lamp is late", "where card", "late again", "Question Label N/A"]


@pytest.fixture(scope="module")
def model():
    config = llama(vocab_size=280, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_length=96)
    return Decoder(config, rngs=nnx.Rngs(0))


def test_logistic_regression_finds_the_optimum_of_scipy():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 5)).astype(np.float32), random.integers(0, 3, 60)
    for l2 in (0.01, 0.3):

        def loss(flat, l2=l2):
            weights, bias = flat[:15].reshape(5, 3), flat[15:]
            nll = -log_softmax(features.astype(np.float64) @ weights + bias)[np.arange(60), labels].mean()
            return nll + l2 / 2 * (weights**2).sum()

        best = minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-7}).x
        weights, bias = logistic_regression(features, labels, n_labels=3, l2=l2)
        np.testing.assert_allclose(weights, best[:15].reshape(5, 3), atol=2e-3)
        np.testing.assert_allclose(bias - bias.mean(), best[15:] - best[15:].mean(), atol=2e-3)


def test_a_probe_finds_what_is_separable_and_chooses_its_strength_on_held_out_features():
    random = np.random.default_rng(1)
    centres = random.normal(size=(4, 8)) * 3
    labels = random.integers(0, 4, 400)
    features = (centres[labels] + random.normal(size=(400, 8))) * 10 + 100  # of any scale
    probe = fit_probe(features[:200], labels[:200], features[200:300], labels[200:300], n_labels=4)
    assert accuracy(probe(features[300:]), labels[300:]) > 0.9
    noise = random.normal(size=(40, 300))
    held_out = np.zeros((200, 300))
    held_out[:, 0] = np.where(labels[:200] < 2, -5, 5)
    noise[:, 0] = np.where(labels[:40] < 2, -1, 1)
    chosen = fit_probe(noise, labels[:40] // 2, held_out, labels[:200] // 2, n_labels=2)
    scores = {}
    for l2 in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        alone = fit_probe(noise, labels[:40] // 2, held_out, labels[:200] // 2, n_labels=2, strengths=(l2,))
        scores[l2] = accuracy(alone(held_out), labels[:200] // 2)
    assert scores[chosen.l2] == max(scores.values())
    with pytest.raises(ConfigError, match="no strengths"):
        fit_probe(noise, labels[:40], held_out, labels[:200], n_labels=4, strengths=())


def test_features_are_the_mean_and_the_last_state_whatever_stands_beside(model):
    random = np.random.default_rng(0)
    texts = [random.integers(1, 280, n).astype(np.int32) for n in (7, 20, 1, 33)]
    found = frozen_features(model, texts, batch_size=3)
    for text, row in zip(texts, found, strict=True):
        hidden = np.asarray(model.hidden(text[None])[0][0])
        np.testing.assert_allclose(row, np.concatenate([hidden.mean(0), hidden[-1]]), atol=2e-5)


def test_few_shot_scores_are_those_of_the_whole_texts(model):
    """Prompt, question and name read in one go, without a cache, and the same with no question."""
    tokenizer = train_tokenizer(WORDS * 3, 280)
    shown = [("my lamp is late", "late_item"), ("where is it", "where_is")]
    labels, texts = ["late_item", "where_is", "cancel"], ["where is my card", "stop it"]
    found = few_shot(model, tokenizer, shown, labels, texts, shots=2)

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    prompt = [0]
    for text, label in shown:
        prompt += encode(f"Question: {text}\nLabel:") + encode(f" {label.replace('_', ' ')}\n\n")
    assert (found.shots, found.prompt_tokens) == (2, len(prompt))

    def likelihood(text, label):
        before = prompt + encode(f"Question: {text}\nLabel:")
        name = encode(f" {label.replace('_', ' ')}\n")
        logits = np.asarray(jax.jit(lambda t: model(t))(np.array([before + name], np.int32)))[0]
        nats = log_softmax(logits)
        return sum(nats[len(before) - 1 + i, token] for i, token in enumerate(name))

    for row, text in zip(found.logits_nl, texts, strict=True):
        expected = [likelihood(text, label) - likelihood(NO_CONTENT, label) for label in labels]
        np.testing.assert_allclose(row, expected, atol=2e-3)


def test_few_shot_shows_as_many_as_fit(model):
    tokenizer = train_tokenizer(WORDS * 3, 280)
    found = few_shot(model, tokenizer, [("where is my lamp", "late")] * 9, ["late", "no"], ["cancel it now"], shots=9)
    assert 0 < found.shots < 9
    with pytest.raises(ConfigError, match="do not fit into the 96 tokens"):
        few_shot(model, tokenizer, [], ["late", "no"], ["zxqy" * 60], shots=1)
