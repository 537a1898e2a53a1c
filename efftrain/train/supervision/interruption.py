"""Interruption by SIGTERM or Ctrl-C: the loop stops at the end of a step, or in the middle of an evaluation."""

import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from efftrain.sharding import hosts
from efftrain.train.metrics.metric_logger import VOTES, MetricLogger
from efftrain.train.objectives.objective import Metrics
from efftrain.train.state import TrainState
from efftrain.train.step import Step

T = TypeVar("T")


class _Ended(BaseException):
    """Not an ``Exception``, so that an evaluation that catches those ends nevertheless."""


class Interruption:
    """Context manager in which the first SIGTERM or SIGINT only sets ``asked``; a second SIGINT stops at once.

    Attributes:
      asked: name of the signal, such as "SIGTERM". None: there was none.
    """

    def __init__(self) -> None:
        self.asked: str | None = None
        self._ends_work = False
        self._previous: dict[int, Any] = {}  # what ``signal.signal`` returned

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def until_asked(self, work: Callable[[], T]) -> T | None:
        """Runs ``work`` to its end, or until a signal ends it.

        Several processes work together and cannot stop at different places: their work ends where it calls
        ``end_if_asked``.

        Args:
          work: a function without side effects.

        Returns:
          The result of ``work``. None: a signal ended it.
        """
        global _at_work
        try:
            _at_work, self._ends_work = self, hosts.process_count() == 1
            if self.asked and self._ends_work:
                return None
            try:
                return work()
            finally:
                self._ends_work = False
        except _Ended:
            return None
        finally:
            _at_work = None

    def asked_anywhere(self) -> str | None:
        """Returns the signal that any process got, and with several processes which one. All of them must call it."""
        if hosts.process_count() == 1:
            return self.asked
        said = enumerate(hosts.exchange(self.asked or ""))
        return next((f"{name} on process {number}" for number, name in said if name), None)

    def asked_by(self, step: int, logger: MetricLogger, *, together: bool) -> str | None:
        """Returns the signal that asked to stop after this step, the same on all processes.

        It is read once in a step, because a signal may come between two lines. With several processes, it is what the
        votes in the metrics have told until the step before, so that they need not wait for each other.

        Args:
          step: number of the step that was just dispatched.
          logger: has the votes of earlier steps.
          together: ask all processes now, because they wait for each other anyway.
        """
        if together or hosts.process_count() == 1:
            return self.asked_anywhere()
        return logger.asked_before(step)

    def vote(self, mesh: Mesh) -> dict[str, jax.Array]:
        """Returns a part of the batch that says whether a signal asked this process to stop.

        In this way all processes learn of it at the same step. Empty for a single process.
        """
        if hosts.process_count() == 1:
            return {}
        asked_by = self.asked  # read once, because a signal may change it
        vote = hosts.process_index() * 256 + signal.Signals[asked_by] if asked_by else -1
        sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        votes = np.full(len(mesh.local_devices), vote, np.int32)
        return {VOTES: jax.make_array_from_process_local_data(sharding, votes, (mesh.size,))}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if self._ends_work:
            self._ends_work = False
            raise _Ended


_at_work: Interruption | None = None


def end_if_asked() -> None:
    """Ends the work of several processes (``until_asked``) if a signal asked any of them to stop.

    All processes must call it equally often; a single process needs no call.
    """
    if _at_work is not None and hosts.process_count() > 1 and _at_work.asked_anywhere():
        raise _Ended


def with_votes(step: Step) -> Step:
    """Wraps a step so that its metrics say which process was asked to stop, from the votes in its batch.

    The step of a single process is returned unchanged.
    """
    if hosts.process_count() == 1:
        return step

    def voting(
        state: TrainState, batch: Mapping[str, jax.Array], frozen: nnx.State | None = None
    ) -> tuple[TrainState, Metrics]:
        state, metrics = step(state, {name: rows for name, rows in batch.items() if name != VOTES}, frozen)
        return state, metrics | {VOTES: (jnp.max(batch[VOTES]), jnp.int32(1))}

    return voting
