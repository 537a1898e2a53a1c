"""Sparsity schedules (in which steps masks change, and how far) and the sparsity of each matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from efftrain.errors import ConfigError

Shape = tuple[int, int, int]  # (matrices of one variable, d_in, d_out)


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Prunes to the target in a single step.

    Attributes:
      at: the step, as a share of the run's steps.
    """

    at: float = 0.5

    def __post_init__(self):
        _check_fractions(at=self.at)

    @property
    def start(self) -> float:
        return self.at

    @property
    def end(self) -> float:
        return self.at

    def due(self, step: Array, n_steps: int) -> Array:
        """Whether the masks change in a step, () bool; ``n_steps`` is the number of steps of the run."""
        return step == round(self.at * n_steps)

    def fraction(self, step: Array, n_steps: int) -> Array:
        """The fraction of the target sparsity that the masks of a step have, () float32."""
        return (step >= round(self.at * n_steps)).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """Prunes gradually: ``1 - (1 - t)^3`` of the target, where t goes from 0 at the start to 1 at the end.

    Attributes:
      start, end: first and last update, as shares of the run's steps. The end must be before the learning rate decays,
        so that the remaining weights have time to recover.
      updates: number of updates of the masks from start to end.

    Source: Zhu and Gupta 2017, equation 1.
    """

    start: float = 0.2
    end: float = 0.7
    updates: int = 50

    def __post_init__(self):
        _check_updates(self)

    def due(self, step: Array, n_steps: int) -> Array:
        first, last = round(self.start * n_steps), round(self.end * n_steps)
        every = max((last - first) // self.updates, 1)
        return (step >= first) & (step <= last) & ((last - step) % every == 0)

    def fraction(self, step: Array, n_steps: int) -> Array:
        first, last = round(self.start * n_steps), round(self.end * n_steps)
        t = jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)
        return 1 - (1 - t) ** 3


@dataclass(frozen=True, kw_only=True)
class Iterative:
    """Prunes in rounds with training between them; each round keeps the same share of the weights that are left.

    Attributes:
      start, end: the steps of the first and of the last round, as shares of the run's steps.
      rounds: number of rounds.
      sparsity: the target; the same as that of the structure.
      rewind: after a round, reset the remaining weights to their values before the first round (weight rewinding,
        Frankle et al. 2020).
    """

    start: float = 0.2
    end: float = 0.7
    rounds: int = 3
    sparsity: float = 0.5
    rewind: bool = False

    def __post_init__(self):
        _check_fractions(start=self.start, end=self.end)
        if self.rounds < 2 or not self.start < self.end:
            raise ConfigError(
                f"iterative has {self.rounds} rounds from {self.start} to {self.end}; give 2 or more and start < end"
            )
        if not 0 < self.sparsity < 1:
            raise ConfigError(
                f"iterative.sparsity is {self.sparsity}; give the sparsity of the structure, between 0 and 1"
            )

    def _steps(self, n_steps: int) -> np.ndarray:
        return np.round(np.linspace(self.start, self.end, self.rounds) * n_steps).astype(int)

    def due(self, step: Array, n_steps: int) -> Array:
        return (step == jnp.asarray(self._steps(n_steps))).any()

    def fraction(self, step: Array, n_steps: int) -> Array:
        done = (step >= jnp.asarray(self._steps(n_steps))).sum()
        shares = [(1 - (1 - self.sparsity) ** (i / self.rounds)) / self.sparsity for i in range(self.rounds)]
        return jnp.asarray([*shares, 1.0], jnp.float32)[done]


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Keeps the target sparsity from ``start`` on; the updates until ``end`` exchange weights. For the score ``RigL``.

    Attributes:
      start, end: first and last update, as shares of the run's steps.
      updates: number of updates of the masks from start to end.
    """

    start: float = 0.0
    end: float = 0.75
    updates: int = 75

    def __post_init__(self):
        _check_updates(self)

    due = Gradual.due

    def fraction(self, step: Array, n_steps: int) -> Array:
        return (step >= round(self.start * n_steps)).astype(jnp.float32)


Schedule = OneShot | Gradual | Iterative | Constant


def _check_updates(schedule: Gradual | Constant) -> None:
    start, end, updates = schedule.start, schedule.end, schedule.updates
    _check_fractions(start=start, end=end)
    if not start < end or updates < 1:
        raise ConfigError(
            f"the schedule prunes from {start} to {end} in {updates} updates; give start < end and 1 update or more"
        )


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Gives every matrix the same sparsity."""

    def sparsities(self, shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
        """The sparsity of each variable's matrices, so that all together have ``sparsity``."""
        return dict.fromkeys(shapes, sparsity)


@dataclass(frozen=True, kw_only=True)
class ErdosRenyi:
    """Gives a (d, f) matrix a density in proportion to ``(d + f) / (d f)``, at most 1; for 80 % sparsity and more.

    Source: Mocanu et al. 2018.
    """

    def sparsities(self, shapes: Mapping[str, Shape], sparsity: float) -> dict[str, float]:
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        raw = {name: (d + f) / (d * f) for name, (_, d, f) in shapes.items()}
        dense: set[str] = set()
        while True:  # matrices whose density would exceed 1 stay dense, and the rest gets sparser instead
            left = (1 - sparsity) * sum(sizes.values()) - sum(sizes[name] for name in dense)
            scale = left / sum(raw[name] * sizes[name] for name in shapes if name not in dense)
            over = {name for name in shapes if name not in dense and scale * raw[name] > 1}
            if not over:
                return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in shapes}
            dense |= over


@dataclass(frozen=True, kw_only=True)
class Global:
    """Ranks the weights of all matrices together.

    Attributes:
      max_sparsity: the highest sparsity of a single matrix, so that thin layers are not emptied.
    """

    max_sparsity: float = 0.95

    def __post_init__(self):
        if not 0 < self.max_sparsity < 1:
            raise ConfigError(
                f"global.max_sparsity is {self.max_sparsity}; give the highest sparsity of a matrix, such as 0.95"
            )


Distribution = Uniform | ErdosRenyi | Global


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"schedule.{name} is {value}; it is a share of the steps, give a number from 0 to 1")
