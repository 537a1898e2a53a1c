"""Schedules against their formulas, written again in NumPy."""

import numpy as np
import pytest

from efftrain.errors import ConfigError
from efftrain.train.schedules import Cosine, WarmupStableDecay


def factors(schedule, n_steps: int) -> np.ndarray:
    factor = schedule.build(n_steps)
    return np.array([float(factor(step)) for step in range(n_steps)])


def test_warmup_stable_decay_follows_its_formula():
    got = factors(WarmupStableDecay(warmup=0.1, decay=0.2, final=0.1), 50)
    up = np.arange(1, 6) / 5
    down = 0.1 + 0.9 * (1 - np.sqrt(np.arange(10) / 10))
    np.testing.assert_allclose(got, [*up, *np.ones(35), *down], atol=1e-6)


def test_cosine_follows_its_formula():
    got = factors(Cosine(warmup=0.2, final=0.1), 20)
    up = np.arange(1, 5) / 4
    down = 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * np.arange(16) / 16))
    np.testing.assert_allclose(got, [*up, *down], atol=1e-6)


@pytest.mark.parametrize("schedule", [WarmupStableDecay(), Cosine()])
@pytest.mark.parametrize("n_steps", [1, 2, 7])
def test_short_runs_have_a_learning_rate_in_every_step(schedule, n_steps):
    got = factors(schedule, n_steps)
    assert np.all((got > 0) & (got <= 1))


@pytest.mark.parametrize("schedule", [WarmupStableDecay(final=0.25), Cosine(final=0.25)])
def test_the_schedule_ends_at_its_final_factor_and_stays_there(schedule):
    factor = schedule.build(100)
    np.testing.assert_allclose([float(factor(step)) for step in (100, 101, 1000)], 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "field"),
    [
        (lambda: WarmupStableDecay(warmup=0.7, decay=0.5), "warmup"),
        (lambda: WarmupStableDecay(decay=-0.1), "decay"),
        (lambda: Cosine(final=1.5), "final"),
        (lambda: Cosine(warmup=float("nan")), "warmup"),
    ],
)
def test_an_impossible_schedule_is_named(build, field):
    with pytest.raises(ConfigError, match=rf"schedule\.{field}"):
        build()
