"""Scores for the answers to a task, as pure functions of NumPy arrays."""

from collections.abc import Sequence

import numpy as np

BINS = 15  # of the calibration error


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the rows whose largest logit (n, labels) is that of their label (n,)."""
    return float((logits.argmax(-1) == labels).mean())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 score over all labels that occur as truth or as answer; rare and frequent labels have the same weight."""
    said, scores = logits.argmax(-1), []
    for label in np.union1d(said, labels):
        both = ((said == label) & (labels == label)).sum()
        scores.append(2 * both / ((said == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean distance between confidence and accuracy, over bins of equal width.

    Source: Guo et al. 2017, equation 5.
    """
    probabilities = np.exp(log_softmax(logits))
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (a, b] each
    gaps = [abs((right[bin_of == b] - confidence[bin_of == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, in nats."""
    return float(-np.take_along_axis(log_softmax(logits), labels[:, None], -1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, computed in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def exact_match(answers: Sequence[str], truth: Sequence[str]) -> float:
    """Share of the answers that equal the truth, apart from surrounding white space."""
    return float(np.mean([a.strip() == b.strip() for a, b in zip(answers, truth, strict=True)]))


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All scores of a classifier, by name: ``accuracy``, ``macro_f1``, ``ece`` and ``nll``."""
    return {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "ece": calibration_error(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
    }
