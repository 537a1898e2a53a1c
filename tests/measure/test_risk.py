"""The risk bound against simulation, and the order of its tests."""

import numpy as np
import pytest

from efftrain.measure.risk import last_safe, p_value


@pytest.mark.parametrize(("mean", "n"), [(0.05, 60), (0.2, 40), (0.5, 100)])
@pytest.mark.parametrize("graded", [False, True])
def test_a_mean_at_the_bound_is_rarely_called_lower(mean, n, graded):
    """10,000 samples whose true mean is the bound: at 10 %, at most about a tenth may have a small p-value."""
    rng = np.random.default_rng(0)
    draws = rng.beta(2 * mean, 2 * (1 - mean), (10_000, n)) if graded else rng.random((10_000, n)) < mean
    wrong = np.mean([p_value(losses, mean) <= 0.1 for losses in draws[:2000]])
    assert wrong <= 0.1 + 0.02


def test_a_mean_well_below_is_told_and_one_above_is_not():
    rng = np.random.default_rng(1)
    assert p_value(rng.random(200) < 0.01, 0.1) < 0.01
    assert p_value(rng.random(200) < 0.3, 0.1) == 1
    assert p_value([0.0] * 10, 0.1) > p_value([0.0] * 100, 0.1)  # more samples, more certainty


def test_the_tests_stop_at_the_first_that_fails():
    safe, bad = [0.0] * 200, [0.5] * 200
    assert last_safe([safe, safe, bad, safe], 0.1, 0.05) == 1
    assert last_safe([bad, safe], 0.1, 0.05) is None
    assert last_safe([safe, safe], 0.1, 0.05) == 1
