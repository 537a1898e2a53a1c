"""What a run shows and keeps of itself while it goes: progress, metrics, times."""

from typing import Any

import jax
import numpy as np

from efftrain.errors import RunError
from efftrain.progress import Progress
from efftrain.train.objective import Metrics
from efftrain.train.run import MetricsLog, Run, read_json
from efftrain.train.timing import Timing

FIGURES = "training.json"


class Recorder:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host.

    Args:
      run: where they are written.
      timing: of this run's step.
      start: the step that was restored, 0 for a new run.
      steps: the last one.
      max_bad_steps: see ``Training``.
    """

    def __init__(self, run: Run, timing: Timing, *, start: int, steps: int, max_bad_steps: int):
        self._run, self._timing, self._max_bad_steps = run, timing, max_bad_steps
        self._log = MetricsLog(run.path, after_step=start)
        self._pending: tuple[int, Metrics] | None = None
        self._figures: dict[str, float] = {}
        self.progress = Progress("train", steps, unit="steps", initial=start)

    def __enter__(self) -> "Recorder":
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.progress.__exit__(*exception)
        self._log.close()

    def compiled(self, program: jax.stages.Compiled, seconds: float) -> None:
        """Notes what compiling took and, where the platform says it, the memory that the program needs."""
        self._figures["compile_s"] = seconds
        memory = program.memory_analysis()
        if memory is not None:
            self._figures["program_bytes"] = float(
                memory.argument_size_in_bytes
                + memory.output_size_in_bytes
                - memory.alias_size_in_bytes
                + memory.temp_size_in_bytes
            )

    def push(self, number: int, metrics: Metrics, wait_s: float) -> None:
        """Takes the metrics of a step that was just dispatched, and writes those of the one before.

        Args:
          number: of the step.
          metrics: its (sum, count) pairs, on the device.
          wait_s: how long the loop waited for its batch.
        """
        self._timing.waited(wait_s)
        self._write_pending()
        self._pending = number, metrics

    def flush(self) -> None:
        """Waits for the last step. It has no time: nothing was dispatched behind it; nor has what follows."""
        self._timing.interrupt()
        self._write_pending()
        self._log.flush()
        self._timing.interrupt()

    def write_evaluation(self, number: int, values: dict[str, float]) -> None:
        self._log.write(number, values, split="validation")
        self._log.flush()
        self.progress.print(f"step {number}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def write_figures(self) -> dict[str, float]:
        """Keeps the times of this process in the run, and returns them."""
        figures = self._figures | self._timing.figures()
        if jax.process_index() == 0:
            self._run.write_json(FIGURES, figures)
        return figures

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        number, metrics = self._pending
        self._pending = None
        pairs = jax.device_get(metrics)
        values = {name: float(total / count) if count else np.nan for name, (total, count) in pairs.items()}
        bad_steps = int(values.pop("bad_steps"))
        times = self._timing.step_arrived()
        self._log.write(number, values | times)
        self.progress.advance()
        rate = f", {times['tokens_per_s']:,.0f} tokens/s" if times else ""
        self.progress.note(f"loss {values['loss']:.4f}{rate}")
        if bad_steps >= self._max_bad_steps:
            raise RunError(
                f"{bad_steps} steps in a row, up to step {number}, had a loss or gradient that was not finite; "
                "lower optimizer.peak_lr, or look at the data of these steps"
            )


def read_figures(run: Run) -> dict[str, float]:
    """The times that the process that trained the run last has kept; none where it was killed before."""
    path = run.path / FIGURES
    return read_json(path) if path.exists() else {}
