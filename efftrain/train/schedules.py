"""What changes in the course of a run: learning rates as factors in [0, 1] of the peak, and other figures."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import optax
from jax import Array

from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Base of every schedule of the learning rate, those of forks too.

    ``build`` returns a function from the step, which may be traced, to the factor in [0, 1] of the peak.
    """

    def build(self, n_steps: int) -> optax.Schedule:
        raise TypeError(f"{type(self).__name__} has no build method")


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(ScheduleConfig):
    """Linear warm-up, constant, then ``1 - sqrt`` decay to ``final``. Hu et al. 2024 (MiniCPM); Haegele et al. 2024.

    Attributes:
      warmup: share of the steps.
      decay: share of the steps at the end.
      final: factor that the decay would reach one step behind the last.
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
    """Linear warm-up, then half a cosine down to ``final``. Loshchilov and Hutter 2017."""

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
    """A schedule once more, warm-up included, over the steps that a branch adds. Ibrahim et al. 2024, section 4.1.

    Attributes:
      schedule: is gone through in the steps after ``begin``.
      begin: the step of the other run that is branched from.
    """

    schedule: ScheduleConfig
    begin: int

    def build(self, n_steps: int) -> optax.Schedule:
        factor = self.schedule.build(n_steps - self.begin)
        return lambda step: factor(jnp.maximum(step - self.begin, 0))


@dataclass(frozen=True, kw_only=True)
class Capped(ScheduleConfig):
    """A schedule that stays at ``factor`` of the peak where it would be above it, and so still decays at its end."""

    schedule: ScheduleConfig
    factor: float

    def build(self, n_steps: int) -> optax.Schedule:
        schedule = self.schedule.build(n_steps)
        return lambda step: jnp.minimum(self.factor, schedule(step))


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A figure that moves from ``start`` to ``end`` over the run; None: it stays."""

    start: float
    end: float | None = None
    shape: Literal["cosine", "linear"] = "cosine"

    def at(self, progress: Array) -> Array | float:
        """Its value when a share of the steps is done; a number where it stays."""
        if self.end is None:
            return self.start
        done = (1 - jnp.cos(jnp.pi * progress)) / 2 if self.shape == "cosine" else progress
        return self.start + (self.end - self.start) * done


def _check(schedule) -> None:
    for name, value in vars(schedule).items():
        if not 0 <= value <= 1:
            raise ConfigError(f"schedule.{name} is {value}; it is a share, give a number from 0 to 1")
