"""Evaluations during training: when they are due, and how one that a signal ended is repeated."""

from collections.abc import Callable
from functools import partial

from efftrain.models.decoder import Decoder
from efftrain.sharding import hosts
from efftrain.train.metrics.metric_logger import MetricLogger
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import Run
from efftrain.train.supervision.interruption import Interruption

Evaluate = Callable[[Decoder], dict[str, float]]


class Evaluations:
    """Evaluates a run after some of its steps and writes the figures to its metrics.

    Args:
      evaluate: function from the model to figures. None: the run is not evaluated.
      steps: number of steps of the whole run; it is evaluated after the last one.
      every: steps between two evaluations. None: evaluate only after the last step.
      run: the run, whose metrics have the evaluations of earlier processes.
    """

    def __init__(self, evaluate: Evaluate | None, *, steps: int, every: int | None, run: Run):
        self._evaluate, self._steps, self._every, self._run = evaluate, steps, every, run

    def due(self, step: int) -> bool:
        """Returns whether the run is evaluated after this step."""
        if self._evaluate is None:
            return False
        return step == self._steps or (self._every is not None and step % self._every == 0)

    def missing(self, step: int) -> bool:
        """Returns whether an evaluation of this saved step is due but not written. All processes must call it."""
        return self.due(step) and not hosts.from_first(lambda: self._written(step))

    def run(self, step: int, model: Decoder, logger: MetricLogger, interruption: Interruption) -> bool:
        """Evaluates and writes the figures; returns False, with nothing written, if a signal ended the evaluation."""
        assert self._evaluate is not None  # no evaluation is due without it
        logger.flush()
        with logger.phase("evaluation"):
            found = interruption.until_asked(partial(self._evaluate, model))
        if found is not None:
            logger.write_evaluation(step, found)
        return found is not None

    def _written(self, step: int) -> bool:
        return any(row["step"] == step for row in read_metrics(self._run.path, "validation"))
