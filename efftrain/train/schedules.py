"""Schedules over a run: learning rates as factors in [0, 1] of the peak, and other figures."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array

from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Base class of every learning rate schedule; a fork derives its own from it.

    ``build`` returns a function from the step, which may be traced, to the factor in [0, 1] of the peak learning rate.
    """

    def build(self, n_steps: int) -> optax.Schedule:
        raise TypeError(f"{type(self).__name__} has no build method")


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(ScheduleConfig):
    """Linear warm-up, constant, then ``1 - sqrt`` decay to ``final``. Hu et al. 2024 (MiniCPM); Haegele et al. 2024.

    Attributes:
      warmup: share of the steps at the beginning in which the rate rises.
      decay: share of the steps at the end in which the rate decays.
      final: factor that the decay would reach one step after the last.
    """

    warmup: float = 0.02
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self):
        _check(self)
        if self.warmup + self.decay > 1:
            raise ConfigError(
                f"schedule.warmup {self.warmup} and schedule.decay {self.decay} are more than 1 together; lower one"
            )

    def build(self, n_steps: int) -> optax.Schedule:
        warmup, decay = self.warmup * n_steps, self.decay * n_steps

        def factor(step):
            up = jnp.minimum(1.0, (step + 1) / max(warmup, 1.0))
            done = jnp.clip((step - (n_steps - decay)) / max(decay, 1.0), 0.0, 1.0)
            return up * (self.final + (1 - self.final) * (1 - jnp.sqrt(done)))

        return factor


@dataclass(frozen=True, kw_only=True)
class Cosine(ScheduleConfig):
    """Linear warm-up, then half a cosine down to ``final``. Loshchilov and Hutter 2017.

    Attributes:
      warmup: share of the steps at the beginning in which the rate rises.
      final: factor of the peak at the end.
    """

    warmup: float = 0.02
    final: float = 0.1

    def __post_init__(self):
        _check(self)

    def build(self, n_steps: int) -> optax.Schedule:
        warmup = self.warmup * n_steps

        def factor(step):
            up = jnp.minimum(1.0, (step + 1) / max(warmup, 1.0))
            done = jnp.clip((step - warmup) / max(n_steps - warmup, 1.0), 0.0, 1.0)
            return up * (self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * done)))

        return factor


@dataclass(frozen=True, kw_only=True)
class Rewarmed(ScheduleConfig):
    """A schedule once more, warm-up included, over the steps that are added. Ibrahim et al. 2024, section 4.1.

    Attributes:
      schedule: the schedule for the steps after ``begin``.
      begin: the step of the other run from which the run starts.
    """

    schedule: ScheduleConfig
    begin: int

    def build(self, n_steps: int) -> optax.Schedule:
        factor = self.schedule.build(n_steps - self.begin)
        return lambda step: factor(jnp.maximum(step - self.begin, 0))


@dataclass(frozen=True, kw_only=True)
class Capped(ScheduleConfig):
    """A schedule limited to ``factor`` of the peak: constant while the schedule is above it, decaying at its end.

    Attributes:
      schedule: the schedule that is limited.
      factor: largest factor of the peak.
    """

    schedule: ScheduleConfig
    factor: float

    def build(self, n_steps: int) -> optax.Schedule:
        schedule = self.schedule.build(n_steps)
        return lambda step: jnp.minimum(self.factor, schedule(step))


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A figure that moves from ``start`` to ``end`` over the run.

    Attributes:
      start: value at the beginning.
      end: value at the end. None: the value stays at ``start``.
      shape: "cosine": half a cosine, slow at both ends. "linear": at constant speed.
    """

    start: float
    end: float | None = None
    shape: Literal["cosine", "linear"] = "cosine"

    def at(self, progress: Array) -> Array | float:
        """Returns the value at ``progress``, the share of the run's steps that are done; a float if it is constant."""
        if self.end is None:
            return self.start
        done = (1 - jnp.cos(jnp.pi * progress)) / 2 if self.shape == "cosine" else progress
        return self.start + (self.end - self.start) * done


def _check(schedule) -> None:
    for name, value in vars(schedule).items():
        if not 0 <= value <= 1:
            raise ConfigError(f"schedule.{name} is {value}; it is a share, give a number from 0 to 1")
