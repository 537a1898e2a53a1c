"""The profiler trace of chosen steps: what the host and the devices did, and when.

The trace has no calls of Python functions. Their tracer hooks into every thread of the process, slows each call down,
and has ended a long-lived process with a segmentation fault; the phases of a step are annotated instead.
"""

from pathlib import Path

import jax

from efftrain.errors import ConfigError
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.train.metrics.metric_logger import MetricLogger


def parse_steps(text: str, steps: int) -> tuple[int, int]:
    """Parses ``"10:15"`` to (10, 15): the first and the last step, both included.

    Args:
      text: value of ``training.profile``.
      steps: number of steps of the whole run.

    Raises:
      ConfigError: the text is not two steps of the run, in order.
    """
    try:
        first, last = map(int, text.split(":"))
    except ValueError as error:
        raise ConfigError(f"training.profile is {text!r}; give the first and the last step, such as 10:15") from error
    if not 1 <= first <= last:
        raise ConfigError(f"training.profile is {text!r}; give the first step, from 1, then the last, such as 10:15")
    if last > steps:
        raise ConfigError(f"training.profile is {text!r} and the run has {steps} steps; end it at {steps} or before")
    return first, last


class Profiler:
    """Context manager that traces the chosen steps into a directory; with several processes, only the first traces.

    Args:
      chosen: first and last step. None: no trace.
      directory: where the trace is written.
      logger: counts the time for starting and writing the trace apart from the steps.
      start: step that was restored.
    """

    def __init__(self, chosen: tuple[int, int] | None, directory: Path, logger: MetricLogger, *, start: int):
        self._chosen = chosen if hosts.process_index() == 0 else None
        self._directory, self._logger, self._running = directory, logger, False
        if self._chosen and start >= self._chosen[1]:
            console.print(f"no profile: this run continues after step {self._chosen[1]}", markup=False)

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._running:  # the run ended within the chosen steps
            self._stop("the steps until it ended")

    def before(self, number: int) -> None:
        """Must be called before the step asks for its input; starts the trace if the step is a chosen one."""
        if self._chosen and not self._running and self._chosen[0] <= number <= self._chosen[1]:
            self._logger.flush()
            with self._logger.phase("profile"):
                options = jax.profiler.ProfileOptions()
                options.python_tracer_level = 0
                jax.profiler.start_trace(self._directory, profiler_options=options)
            self._running = True

    def after(self, number: int) -> None:
        """Must be called after the step was dispatched; waits for the last chosen step and ends the trace."""
        if self._running and self._chosen is not None and number == self._chosen[1]:
            self._logger.flush()
            self._stop(f"steps {self._chosen[0]} to {self._chosen[1]}")

    def _stop(self, what: str) -> None:
        self._running = False
        with self._logger.phase("profile"):
            jax.profiler.stop_trace()
        console.print(
            f"profile of {what}: {self._directory}; look at it with: pip install xprof && xprof --port 8791 "
            f"{self._directory}, or open its *.trace.json.gz at https://ui.perfetto.dev",
            markup=False,
        )
