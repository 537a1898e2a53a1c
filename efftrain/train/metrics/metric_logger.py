"""The metric logger: it shows the progress of a run and writes its metrics and times."""

import contextlib
import signal
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from efftrain.errors import RunError
from efftrain.progress import Progress
from efftrain.sharding import hosts
from efftrain.train.metrics.alerts import Alerts
from efftrain.train.metrics.metric_sink import MetricSink
from efftrain.train.metrics.metrics_log import MetricsLog
from efftrain.train.metrics.timing import Timing
from efftrain.train.objectives.objective import Metrics
from efftrain.train.run.directory import Run, read_json
from efftrain.train.run.identity import FIGURES

VOTES = "votes"  # metric of several processes: process * 256 + the signal that asked it to stop, or -1 if none did


class MetricLogger:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host.

    With several processes, all read the metrics, and the first one writes them.

    Args:
      run: the run that the metrics are written to.
      timing: times of this process.
      start: step that was restored, 0 for a new run.
      steps: last step of the run.
      max_bad_steps: see ``Training``.
      sinks: see ``fit``.
    """

    def __init__(
        self,
        run: Run,
        timing: Timing,
        *,
        start: int,
        steps: int,
        max_bad_steps: int,
        sinks: Sequence[MetricSink] = (),
    ):
        self._run, self._timing, self._max_bad_steps = run, timing, max_bad_steps
        self._log = MetricsLog(run.path, after_step=start) if hosts.process_index() == 0 else None
        self._sinks = sinks if self._log else ()
        for sink in self._sinks:
            sink.start(run.path, start)
        self._asked: tuple[int, str] | None = None
        self._pending: tuple[int, Metrics] | None = None
        self._figures: dict[str, float] = {}
        self._alerts = Alerts()
        self.progress = Progress("train", steps, unit="steps", initial=start)

    def __enter__(self) -> "MetricLogger":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        with contextlib.ExitStack() as stack:  # closes all of them, even if one fails
            for end in [sink.close for sink in self._sinks] + ([self._log.close] if self._log else []):
                stack.callback(end)

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Counts the time in this context as the given phase (see ``Timing``), and marks it in a profile."""
        with self._timing.phase(name), jax.profiler.TraceAnnotation(name):
            yield

    def compile(self, program: jax.stages.Wrapped, *arguments: Any) -> jax.stages.Compiled:
        """Compiles a jitted function for these arguments.

        Records whether it came from the compilation cache of an earlier process and, where the platform reports it, the
        memory that the program needs.
        """
        self.progress.note("compiling")
        events: list[str] = []

        def note(event: str, **_: Any) -> None:
            events.append(event)

        with self.phase("compile"):
            lowered = program.lower(*arguments)
            jax.monitoring.register_event_listener(note)
            try:
                compiled = lowered.compile()
            finally:
                jax.monitoring.unregister_event_listener(note)
        self._figures["compile_cached"] = float("/jax/compilation_cache/cache_hits" in events)
        memory = compiled.memory_analysis()
        if memory is not None:
            self._figures["program_bytes"] = float(
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
            )
        return compiled

    def push(self, number: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched, and writes those of the step before.

        Args:
          number: number of the step.
          metrics: (sum, count) pairs on the device.

        Raises:
          RunError: too many consecutive steps were not finite.
        """
        self._write_pending()
        self._pending = number, metrics

    def flush(self) -> None:
        """Waits for the last step and writes its metrics.

        That step and the next one get no step time, because the device does not go from one to the other at once.
        """
        self._timing.interrupt()
        self._write_pending()
        if self._log:
            self._log.flush()
        self._timing.interrupt()

    def asked_before(self, number: int) -> str | None:
        """Returns the signal that asked a process to stop, and which process, if a step before this one reported it.

        For several processes: the answer is the same on all, even if one of them has read the metrics of later steps.
        """
        return self._asked[1] if self._asked and self._asked[0] < number else None

    def write_evaluation(self, number: int, values: dict[str, float]) -> None:
        if self._log:
            self._write(number, values, "validation")
            self._log.flush()
        figures = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.progress.print(f"step {number}, validation: {figures}")

    def write_figures(self) -> dict[str, float]:
        """Writes the times of this process to the run, and returns them."""
        figures = self._figures | self._timing.figures()
        if hosts.process_index() == 0:
            self._run.write_json(FIGURES, figures)
        return figures

    def _write(self, number: int, values: Mapping[str, float], split: str, arrays: Mapping[str, list] = {}) -> None:
        assert self._log is not None  # only the first process calls this
        self._log.write(number, values, split=split, arrays=arrays)
        for sink in self._sinks:
            sink.write(number, values, split)

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        pairs = jax.device_get(metrics)
        vote = int(pairs.pop(VOTES, (-1, 1))[0])
        if vote >= 0 and self._asked is None:
            self._asked = number, f"{signal.Signals(vote % 256).name} on process {vote // 256}"
        arrays = {name: pairs.pop(name) for name in [*pairs] if np.ndim(pairs[name][0])}
        arrays = {name: (total / count).round(3).tolist() for name, (total, count) in arrays.items()}
        values = {name: float(total / count) if count else np.nan for name, (total, count) in pairs.items()}
        bad_steps = int(values.pop("bad_steps"))
        times = self._timing.step_arrived()
        if self._log:
            self._write(number, values | times, "train", arrays)
        for sentence in self._alerts.check(values):
            self.progress.print(f"warning: step {number}: {sentence}")
        self.progress.advance()
        rate = f", {times['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in times else ""
        self.progress.note(f"loss {values['loss']:.4f}{rate}")
        if bad_steps >= self._max_bad_steps:
            raise RunError(
                f"{bad_steps} steps in a row, up to step {number}, had a loss or gradient that was not finite; "
                "lower optimizer.peak_lr, or look at the data of these steps"
            )


def read_figures(run: Run) -> dict[str, float]:
    """Returns the times that the last process of the run wrote; empty if it was killed before that."""
    path = run.path / FIGURES
    return read_json(path) if path.exists() else {}
