"""Scores against sums by hand."""

import math

import numpy as np
import pytest

from efftrain.measure.quality.task_scores import (
    accuracy,
    calibration_error,
    classification,
    exact_match,
    macro_f1,
    negative_log_likelihood,
)


def logits_of(probabilities):
    return np.log(np.array(probabilities, np.float32)) + 5.0  # a constant changes nothing


def test_accuracy_and_f1_by_hand():
    said, truth = np.array([0, 0, 1, 1, 2, 0]), np.array([0, 1, 1, 1, 0, 0])
    logits = np.eye(4)[said]
    assert accuracy(logits, truth) == 4 / 6
    # Label 0: 2 hits of 3 said and 3 true; 1: 2 of 2 and 3; 2: none; 3 never comes up and does not count.
    assert macro_f1(logits, truth) == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    assert macro_f1(np.eye(4)[truth], truth) == 1


def test_calibration_error_by_hand():
    logits = logits_of([[0.95, 0.05], [0.94, 0.06], [0.55, 0.45], [0.3, 0.7]])
    labels = np.array([0, 1, 0, 1])
    # Bins of width 1/15: (14/15, 1] holds 0.95 and 0.94, right once; 0.55 and 0.7 are alone and right.
    expected = (2 * abs(0.5 - 0.945) + abs(1 - 0.55) + abs(1 - 0.7)) / 4
    assert calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    assert calibration_error(logits, labels, bins=1) == pytest.approx(
        abs(0.75 - (0.95 + 0.94 + 0.55 + 0.7) / 4), abs=1e-6
    )
    sure = np.array([[1000.0, 0.0], [0.0, 1000.0]])
    assert calibration_error(sure, np.array([0, 1])) == 0
    assert calibration_error(sure, np.array([1, 0])) == 1


def test_likelihood_by_hand():
    logits = logits_of([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert negative_log_likelihood(logits, np.array([1, 2])) == pytest.approx(
        (math.log(4) - math.log(0.8)) / 2, abs=1e-6
    )
    found = classification(logits, np.array([1, 2]))
    assert found["accuracy"] == 0.5
    assert set(found) == {"accuracy", "macro_f1", "ece", "nll"}


def test_exact_match_forgives_white_space_alone():
    assert exact_match(["2.10", " 3.00 ", "4.0", ""], ["2.10", "3.00", "4.00", "1"]) == 0.5
