"""What a run shows and keeps of itself while it goes: progress, metrics, times."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from efftrain.errors import RunError
from efftrain.progress import Progress
from efftrain.train.objective import Metrics
from efftrain.train.run import MetricsLog, Run, read_json
from efftrain.train.timing import Timing

if TYPE_CHECKING:
    from efftrain.train.loop import Training


class Recorder:
    """Reads the metrics of a step after the next one was dispatched, so that the device never waits for the host."""

    def __init__(self, directory: Path, config: "Training", factor: Callable, timing: Timing, *, start: int):
        self._config, self._factor, self._timing = config, factor, timing
        self._log = MetricsLog(directory, after_step=start)
        self._pending: tuple[int, Metrics, float] | None = None
        self._figures: dict[str, float] = {}
        self._bad_steps = 0
        self.progress = Progress("train", config.steps, unit="steps", initial=start)

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
        """Takes the metrics of a step that was just dispatched, and writes those of the one before."""
        self._write_pending()
        self._pending = number, metrics, wait_s

    def flush(self) -> None:
        """Waits for the last step; what follows is no part of any step's time."""
        self._write_pending()
        self._timing.interrupt()

    def write_evaluation(self, number: int, values: dict[str, float]) -> None:
        self._log.write(number, values, split="validation")
        self.progress.print(f"step {number}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def figures(self, run: Run) -> dict[str, float]:
        """The run's times; those of the process that trained it last where this one had nothing to do."""
        path = run.path / "training.json"
        if not self._timing.figures() and path.exists():
            return read_json(path)
        figures = self._figures | self._timing.figures()
        run.write_json(path.name, figures)
        return figures

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        number, metrics, wait_s = self._pending
        self._pending = None
        values = {name: float(total / count) for name, (total, count) in jax.device_get(metrics).items()}
        values["lr"] = float(self._config.optimizer.peak_lr * self._factor(number - 1))
        times = self._timing.step_arrived(wait_s)
        self._log.write(number, values | times)
        self.progress.advance()
        rate = f", {times['tokens_per_s']:,.0f} tokens/s" if times else ""
        self.progress.note(f"loss {values['loss']:.4f}{rate}")
        self._bad_steps = self._bad_steps + 1 if values["skipped"] else 0
        if self._bad_steps >= self._config.max_bad_steps:
            raise RunError(
                f"{self._bad_steps} steps in a row, up to step {number}, had a loss or gradient that was not finite; "
                "lower optimizer.peak_lr, or look at the data of these steps"
            )
