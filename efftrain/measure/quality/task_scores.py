"""How good answers are: pure functions of NumPy arrays."""

from collections.abc import Sequence

import numpy as np

BINS = 15


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose largest logit (n, labels) is at their label (n,)."""
    return float((logits.argmax(-1) == labels).mean())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the F1 scores of all labels that occur, as truth or as answer: each counts the same, however rare."""
    said, scores = logits.argmax(-1), []
    for label in np.union1d(said, labels):
        both = ((said == label) & (labels == label)).sum()
        scores.append(2 * both / ((said == label).sum() + (labels == label).sum()))
    return float(np.mean(scores))


def calibration_error(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence is from accuracy, over bins of equal width.

    Source: Guo et al. 2017, equation 5.
    """
    probabilities = np.exp(log_softmax(logits))
    confidence, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)  # (a, b] each
    gaps = [abs((right[bin_of == b] - confidence[bin_of == b]).sum()) for b in range(bins)]
    return float(sum(gaps) / len(labels))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean nats of the labels."""
    return float(-np.take_along_axis(log_softmax(logits), labels[:, None], -1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def exact_match(answers: Sequence[str], truth: Sequence[str]) -> float:
    """The share of answers that are the truth, but for white space around them."""
    return float(np.mean([a.strip() == b.strip() for a, b in zip(answers, truth, strict=True)]))


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All figures of a classifier by name."""
    return {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "ece": calibration_error(logits, labels),
        "nll": negative_log_likelihood(logits, labels),
    }
