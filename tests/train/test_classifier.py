"""The classifier's training: its minimum against SciPy, its measures against brute force, and whether it separates."""

import itertools
import sysconfig
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from efftrain.data.documents import Text
from efftrain.data.rules.classifier import NgramClassifier, ngram_features, read_weights
from efftrain.errors import ConfigError, CorpusError
from efftrain.train import classifier
from efftrain.train.classifier import ClassifierTraining, auc, fit_logistic, logistic_loss, sample, train_classifier

WORDS = [f"w{i}" for i in range(60)]


def word_texts(n, seed, *, tilt=0.0):
    """Texts of random words, of which those with higher numbers are more frequent with ``tilt``. One has no word."""
    rng = np.random.default_rng(seed)
    odds = np.exp(tilt * np.arange(len(WORDS)) / len(WORDS))
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(3, 200), p=odds / odds.sum())) for _ in range(n - 1)]
    return [*texts, "..."]


@pytest.fixture(scope="module")
def python_files():
    """Files of the standard library, of some length."""
    folder, texts = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-j]*/*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.parent.name != "site-packages" and len(text) > 500:
            texts.append(text[:10_000])
    assert len(texts) >= 240
    return texts[:240]


def junk(texts, seed=0):
    """Of each text in turn: its characters shuffled, a table instead of it, or itself without any space."""
    rng = np.random.default_rng(seed)
    made = []
    for number, text in enumerate(texts):
        if number % 3 == 0:
            made.append("".join(rng.permutation(list(text[:3000]))))
        elif number % 3 == 1:
            made.append("\n".join(",".join(f"{x:.3f}" for x in rng.normal(size=8)) for _ in range(60)))
        else:
            made.append("".join(text[:4000].split()))
    return made


def dense(texts, n_buckets):
    buckets, values, offsets = ngram_features([text.encode() for text in texts], n_buckets)
    matrix = np.zeros((len(texts), n_buckets))
    matrix[np.repeat(np.arange(len(texts)), np.diff(offsets)), buckets] = values
    return matrix, (buckets, values, offsets)


def loss_by_hand(parameters, matrix, labels, l2):
    """Both classes have half of the weight; the bias is last and is not penalised."""
    logits = matrix @ parameters[:-1] + parameters[-1]
    nats = np.logaddexp(0, np.where(labels, -logits, logits))
    return (nats[labels].mean() + nats[~labels].mean()) / 2 + l2 / 2 * (parameters[:-1] ** 2).sum()


def test_minimum_is_the_one_that_scipy_finds():
    """Classes of unequal size, buckets that words share, and more features than stand in one row."""
    texts = word_texts(40, 0) + word_texts(90, 1, tilt=1.0)
    labels = np.arange(130) >= 40
    config = ClassifierTraining(n_buckets=128, l2=1e-3, tolerance=1e-6)
    matrix, features = dense(texts, config.n_buckets)
    assert (matrix > 0).sum(axis=1).max() > classifier._WIDTH
    truth = scipy.optimize.minimize(
        loss_by_hand, np.zeros(129), (matrix, labels, config.l2), method="L-BFGS-B", options={"maxiter": 5000}
    )
    linear, loss, iterations, converged = fit_logistic(*features, labels, config)
    assert converged
    assert iterations < config.max_iterations
    found = np.append(linear.weights, linear.bias).astype(np.float64)
    assert loss == pytest.approx(truth.fun, rel=1e-4)
    assert loss == pytest.approx(loss_by_hand(found, matrix, labels, config.l2), rel=1e-5)
    assert loss < 0.9 * np.log(2)
    np.testing.assert_allclose(found, truth.x, atol=0.02 * np.abs(truth.x).max())


def test_loss_and_gradient_by_hand():
    """Away from the minimum, where every term counts; a text without a word has the bias alone."""
    texts, labels = word_texts(7, 3), np.array([0, 1, 1, 0, 1, 0, 1], bool)
    matrix, features = dense(texts, 64)
    rng = np.random.default_rng(0)
    parameters = rng.normal(size=65)
    data = classifier._padded(*features) | {
        "labels": jnp.asarray(labels),
        "weights": jnp.asarray(np.where(labels, 0.5 / 4, 0.5 / 3), jnp.float32),
    }
    tree = {"weights": jnp.asarray(parameters[:-1], jnp.float32), "bias": jnp.float32(parameters[-1])}
    value, gradient = jax.value_and_grad(logistic_loss)(tree, data, 0.3)
    assert value == pytest.approx(loss_by_hand(parameters, matrix, labels, 0.3), rel=1e-5)
    by_hand = scipy.optimize.approx_fprime(parameters, loss_by_hand, 1e-6, matrix, labels, 0.3)
    np.testing.assert_allclose(np.append(gradient["weights"], gradient["bias"]), by_hand, rtol=1e-3, atol=1e-4)


def test_auc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    for n in (2, 3, 10, 101):
        scores = rng.integers(0, 8, n).astype(float)  # with ties
        labels = np.arange(n) < max(n // 3, 1)
        pairs = list(itertools.product(scores[labels], scores[~labels]))
        expected = sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)
        assert auc(scores, labels) == pytest.approx(expected)
    assert auc(np.array([0.1, 0.9]), np.array([False, True])) == 1
    assert auc(np.array([0.1, 0.9]), np.array([True, False])) == 0


def test_sample_gives_every_text_the_same_chance():
    """20 texts, 5 kept, 2,000 seeds: 500 +- 19 times each."""
    texts = [str(i) for i in range(20)]
    counts = Counter(text for seed in range(2000) for text in sample(iter(texts), 5, seed))
    assert set(counts) == set(texts)
    assert all(abs(count - 500) < 5 * 19.4 for count in counts.values())
    assert sample(texts, 20, 0) == texts
    assert len(set(sample(texts, 19, 0))) == 19


def test_code_is_told_from_junk_it_was_not_trained_on(python_files, tmp_path):
    half = len(python_files) // 2
    good, raw = python_files[:half], junk(python_files[half:])
    report = train_classifier(good, raw, tmp_path / "quality.npz", ClassifierTraining(held_out=0.3))
    assert report.auc > 0.9
    assert report.accuracy > 0.85
    assert report.loss < 0.1
    assert sum(report.n_train) + sum(report.n_held_out) == len(good) + len(raw)

    rule = NgramClassifier.load(tmp_path / "quality.npz")
    assert rule.digest == report.digest
    assert not rule(Text(junk(["", "x"], seed=9)[1])).keep  # another table
    unseen = (Path(sysconfig.get_path("stdlib")) / "unittest" / "case.py").read_text()
    assert rule(Text(unseen[:10_000])).keep


def test_shuffled_labels_are_not_learned(python_files, tmp_path):
    """The check above can fail: the same texts without a meaning in their labels give chance."""
    half = len(python_files) // 2
    texts = python_files[:half] + junk(python_files[half:])
    labels = np.random.default_rng(0).random(len(texts)) < 0.5
    good, raw = ([text for text, label in zip(texts, labels, strict=True) if label == which] for which in (True, False))
    report = train_classifier(good, raw, tmp_path / "nothing.npz", ClassifierTraining(held_out=0.5))
    assert report.auc == pytest.approx(0.5, abs=0.15)  # three standard deviations of 120 held-out texts
    assert report.accuracy == pytest.approx(0.5, abs=0.15)
    assert report.loss < 0.6  # it did learn its training texts by heart


def test_limits_are_shares_of_the_held_out_raw_text(tmp_path):
    config = ClassifierTraining(held_out=0.5, n_buckets=1 << 12)
    raw = word_texts(400, 0)
    report = train_classifier(word_texts(100, 1, tilt=1.0), raw, tmp_path / "w.npz", config)
    linear = read_weights(tmp_path / "w.npz")
    untrained = word_texts(2000, 5)  # drawn in the same way as the raw ones
    scores = linear.probabilities([text.encode() for text in untrained])
    for share in (0.1, 0.5, 0.9):
        assert (scores >= report.thresholds[share]).mean() == pytest.approx(share, abs=0.1)


def test_equal_texts_are_on_one_side(tmp_path):
    """Else what was learned by heart would count as held-out."""
    good, raw = word_texts(40, 0, tilt=1.0) * 7, word_texts(40, 1) * 7
    report = train_classifier(good, raw, tmp_path / "w.npz", ClassifierTraining(held_out=0.3, n_buckets=256))
    assert all(n % 7 == 0 and n > 0 for n in (*report.n_train, *report.n_held_out))


def test_same_seed_same_file(tmp_path):
    good, raw = word_texts(80, 0, tilt=1.0), word_texts(80, 1)

    def trained(name, seed):
        config = ClassifierTraining(n_buckets=256, max_examples=50, held_out=0.3, seed=seed)
        report = train_classifier(good, raw, tmp_path / name, config)
        assert sum(report.n_train) + sum(report.n_held_out) == 100
        return report, (tmp_path / name).read_bytes()

    first = trained("a", 0)
    assert trained("b", 0) == first
    assert trained("c", 1) != first


def test_half_a_surrogate_pair_is_no_obstacle(tmp_path):
    good = [f"{text} \ud800" for text in word_texts(40, 0, tilt=1.0)]
    report = train_classifier(good, word_texts(40, 1), tmp_path / "w.npz", ClassifierTraining(n_buckets=256))
    assert report.n_train[0] > 0


def test_too_few_examples_are_refused_and_nothing_is_written(tmp_path):
    texts = word_texts(50, 0)
    for good, raw, message in (
        ([], texts, "0 good examples are too few"),
        (texts, texts[:1], "1 raw examples are too few"),
        (texts, ["the same"] * 50, "side has .* 0 raw examples; give more examples, or another held_out"),
    ):
        with pytest.raises(CorpusError, match=message):
            train_classifier(good, raw, tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "field", [{"held_out": 0.0}, {"held_out": 1.0}, {"l2": 0.0}, {"max_examples": 0}, {"tolerance": float("nan")}]
)
def test_impossible_configurations_are_refused(field):
    with pytest.raises(ConfigError, match=f"classifier.{next(iter(field))} is"):
        ClassifierTraining(**field)
