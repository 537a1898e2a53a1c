"""Trains the hashed n-gram classifier that tells good examples from raw text.

The method is that of DCLM (Li et al. 2024, 2406.11794, section 4.4): the positives are examples of what a model should
learn from, the negatives are a sample of the raw corpus itself, and the score ranks that corpus. The loss is convex and
L-BFGS finds its minimum, so there is no learning rate and no number of epochs to choose.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from efftrain.data.rules.classifier import N_BUCKETS, LinearWeights, ngram_features, write_weights
from efftrain.data.stages.spool import stable_hash
from efftrain.errors import ConfigError, CorpusError
from efftrain.progress import Progress

KEPT_SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
_WIDTH = 64  # features per row of the padded matrix; a text has as many rows as it needs
_LBFGS = optax.lbfgs()
_BLOCK = 64  # texts whose features are computed together; about 256 kB of text run fastest

Parameters = dict[str, Array]
Data = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class ClassifierTraining:
    """Configuration of the training of a classifier.

    Attributes:
      n_buckets: number of hash buckets, a power of two; with more buckets, fewer n-grams share one.
      max_examples: largest number of examples of each class. If more are given, this number is sampled evenly from all
        of them; the examples are held in memory.
      held_out: share of the examples that are only used to measure. Equal texts are on the same side.
      l2: weight of ``|weights|**2 / 2`` relative to the mean loss.
      max_iterations: largest number of L-BFGS iterations.
      tolerance: training stops when the largest component of the gradient is not above this.
      seed: seed of the sample and of the choice of held-out examples.
    """

    n_buckets: int = N_BUCKETS
    max_examples: int = 50_000
    held_out: float = 0.1
    l2: float = 1e-5
    max_iterations: int = 100
    tolerance: float = 1e-4
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.held_out < 1:
            raise ConfigError(f"classifier.held_out is {self.held_out}; it must lie between 0 and 1")
        for name in ("l2", "tolerance", "max_examples", "max_iterations"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"classifier.{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class ClassifierReport:
    """Result of the training of a classifier, with its quality on held-out texts.

    Attributes:
      n_train, n_held_out: number of examples (good, raw).
      auc: held-out probability that a good text scores above a raw one; 0.5 is chance.
      accuracy: held-out accuracy, the mean of the two classes, at probability 0.5; 0.5 is chance.
      thresholds: share of raw text -> the score that this share of the held-out raw texts reaches.
      loss: mean nats of the training examples including the penalty, both classes with equal weight; ln 2 is chance.
      iterations, converged: number of iterations, and whether the minimum was found within ``max_iterations``.
      digest: digest of the weights, as in ``NgramClassifier.digest``.
    """

    n_train: tuple[int, int]
    n_held_out: tuple[int, int]
    auc: float
    accuracy: float
    thresholds: dict[float, float]
    loss: float
    iterations: int
    converged: bool
    digest: str


def train_classifier(
    good: Iterable[str], raw: Iterable[str], out: Path | str, config: ClassifierTraining | None = None
) -> ClassifierReport:
    """Trains a classifier and writes its weights to ``out``, for ``NgramClassifier.load(out)``.

    The same texts, configuration and machine give the same file.

    Args:
      good: texts to prefer.
      raw: a sample of the texts that the classifier will judge.
      out: path of the ``.npz`` file, which is replaced once the new one is complete.
      config: see ``ClassifierTraining``. None: its defaults.

    Raises:
      CorpusError: there are too few examples to train on or to hold out.
    """
    config = config or ClassifierTraining()
    texts, labels = [], []
    for label, (name, source) in enumerate((("raw", raw), ("good", good))):
        sampled = sample(source, config.max_examples, config.seed)
        texts += [text.encode(errors="replace") for text in sampled]
        labels += [label] * len(sampled)
        if len(sampled) < 2:
            raise CorpusError(f"{len(sampled)} {name} examples are too few for a classifier; give several hundred")
    labels = np.array(labels, bool)
    hashes = np.array([stable_hash(text.decode(), f"held out {config.seed}") for text in texts], np.uint64)
    held_out = hashes < np.uint64(int(config.held_out * 2**64))
    counts = {
        side: (int((labels & mask).sum()), int((~labels & mask).sum()))
        for side, mask in (("training", ~held_out), ("held-out", held_out))
    }
    for side, (n_good, n_raw) in counts.items():
        if not n_good or not n_raw:
            raise CorpusError(
                f"the {side} side has {n_good} good and {n_raw} raw examples; give more examples, or another held_out"
            )
    numbers = np.flatnonzero(~held_out)
    features = _features([texts[i] for i in numbers], config.n_buckets)
    linear, loss, iterations, converged = fit_logistic(*features, labels[numbers], config)
    write_weights(Path(out), linear)
    tested = np.flatnonzero(held_out)
    blocks = [tested[start : start + _BLOCK] for start in range(0, len(tested), _BLOCK)]
    scores = np.concatenate([linear.probabilities([texts[i] for i in block]) for block in blocks])
    truth = labels[tested]
    return ClassifierReport(
        n_train=counts["training"],
        n_held_out=counts["held-out"],
        auc=auc(scores, truth),
        accuracy=float((scores[truth] > 0.5).mean() + (scores[~truth] <= 0.5).mean()) / 2,
        thresholds={share: float(np.quantile(scores[~truth], 1 - share)) for share in KEPT_SHARES},
        loss=loss,
        iterations=iterations,
        converged=converged,
        digest=linear.digest,
    )


def sample(texts: Iterable[str], n: int, seed: int) -> list[str]:
    """Draws ``n`` of the texts, each with the same probability, in one pass: Vitter 1985, algorithm R."""
    rng = np.random.default_rng(seed)
    kept: list[str] = []
    for number, text in enumerate(texts):
        if number < n:
            kept.append(text)
        elif (place := int(rng.integers(number + 1))) < n:
            kept[place] = text
    return kept


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve: the share of pairs (True, False) in which True scores higher; a tie counts half.

    Args:
      scores: (n,) numbers.
      labels: (n,) bool, both values present.

    Source: the rank sum of Mann and Whitney 1947.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1; equal scores share the mean of their ranks
    n_true = int(labels.sum())
    pairs = n_true * (len(labels) - n_true)
    return float((ranks[labels].sum() - n_true * (n_true + 1) / 2) / pairs)


def fit_logistic(
    buckets: np.ndarray, values: np.ndarray, offsets: np.ndarray, labels: np.ndarray, config: ClassifierTraining
) -> tuple[LinearWeights, float, int, bool]:
    """Fits a logistic regression on sparse features; each class has half of the weight.

    Args:
      buckets, values, offsets: features as ``ngram_features`` returns them.
      labels: (texts,) bool.
      config: see ``ClassifierTraining``.

    Returns:
      The weights, the loss in nats with its penalty, the number of iterations, and whether the fit converged.
    """
    data = _padded(buckets, values, offsets) | {
        "labels": jnp.asarray(labels),
        "weights": jnp.asarray(np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum()), jnp.float32),
    }
    parameters = {"weights": jnp.zeros(config.n_buckets), "bias": jnp.zeros(())}
    state = _LBFGS.init(parameters)
    value, slope = _measure(parameters, data, config.l2)
    iterations = 0
    with Progress("Training the classifier", config.max_iterations, unit="iterations") as progress:
        while slope > config.tolerance and iterations < config.max_iterations:
            parameters, state, value, slope = _step(parameters, state, data, config.l2)
            iterations += 1
            progress.advance()
            progress.note(f"loss {float(value):.4f}")
    linear = LinearWeights(np.asarray(parameters["weights"]), float(parameters["bias"]))
    return linear, float(value), iterations, bool(slope <= config.tolerance)


def logistic_loss(parameters: Parameters, data: Data, l2: float | Array) -> Array:
    """Weighted sum of the negative log likelihoods of the labels, plus ``l2 * |weights|**2 / 2``; () float32 nats.

    Args:
      parameters: ``weights`` (buckets,) and ``bias`` ().
      data: ``buckets`` int32 and ``values`` float32, both (rows, width), with value 0 in the padding; ``owners``
        (rows,) int32, ascending: the text of each row; ``labels`` (texts,) bool; ``weights`` (texts,) float32, which
        add up to 1.
    """
    weights, bias = parameters["weights"], parameters["bias"]
    partial_logits = (weights[data["buckets"]] * data["values"]).sum(-1)
    logits = bias + jax.ops.segment_sum(
        partial_logits, data["owners"], num_segments=len(data["labels"]), indices_are_sorted=True
    )
    nats = jax.nn.softplus(jnp.where(data["labels"], -logits, logits))
    return (nats * data["weights"]).sum() + l2 / 2 * (weights**2).sum()


@jax.jit
def _measure(parameters: Parameters, data: Data, l2: float | Array) -> tuple[Array, Array]:
    """Returns the loss and the largest absolute component of its gradient."""
    value, gradient = jax.value_and_grad(logistic_loss)(parameters, data, l2)
    return value, optax.tree.norm(gradient, ord="inf")


@jax.jit
def _step(parameters: Parameters, state: Any, data: Data, l2: float | Array) -> tuple[Parameters, Any, Array, Array]:
    """One iteration of L-BFGS; also returns the loss and the largest gradient component at the new point."""
    value_fn = partial(logistic_loss, data=data, l2=l2)
    # The line search has computed value and gradient at the point where it ended: they are taken from its state.
    value, gradient = optax.value_and_grad_from_state(value_fn)(parameters, state=state)
    updates, state = _LBFGS.update(gradient, state, parameters, value=value, grad=gradient, value_fn=value_fn)
    slope = optax.tree.norm(optax.tree.get(state, "grad"), ord="inf")
    # ty: optax returns the type of its argument, which it calls a tree of arrays.
    return optax.apply_updates(parameters, updates), state, optax.tree.get(state, "value"), slope  # ty: ignore[invalid-explicit-return]


def _features(texts: list[bytes], n_buckets: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``ngram_features`` of many texts, block by block, because its temporary arrays are several times as large."""
    starts = range(0, len(texts), _BLOCK)
    parts = [ngram_features(texts[start : start + _BLOCK], n_buckets) for start in starts]
    buckets, values, offsets = zip(*parts, strict=True)
    lengths = np.concatenate([np.diff(part) for part in offsets])
    return np.concatenate(buckets), np.concatenate(values), np.concatenate([[0], np.cumsum(lengths)])


def _padded(buckets: np.ndarray, values: np.ndarray, offsets: np.ndarray) -> dict[str, Array]:
    """Arranges features in rows of ``_WIDTH``: row sums vectorise, a scatter-add of every single feature does not."""
    lengths = np.diff(offsets)
    n_rows = -(-lengths // _WIDTH)
    first_row = np.concatenate([[0], np.cumsum(n_rows)])
    place = np.repeat(first_row[:-1] * _WIDTH - offsets[:-1], lengths) + np.arange(len(buckets))
    padded_buckets = np.zeros(int(first_row[-1]) * _WIDTH, np.int32)
    padded_values = np.zeros(len(padded_buckets), np.float32)
    padded_buckets[place], padded_values[place] = buckets, values
    return {
        "buckets": jnp.asarray(padded_buckets.reshape(-1, _WIDTH)),
        "values": jnp.asarray(padded_values.reshape(-1, _WIDTH)),
        "owners": jnp.asarray(np.repeat(np.arange(len(lengths)), n_rows), jnp.int32),
    }
