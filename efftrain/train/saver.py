"""Saves a run with its position in the data, and ends the process when a signal asked for it."""

from typing import NoReturn

from efftrain.progress import console
from efftrain.train.batches import Batches
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.metrics.metric_logger import MetricLogger
from efftrain.train.run.directory import Run
from efftrain.train.state import TrainState
from efftrain.train.supervision.supervise import report_checkpoint

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: everything is saved, the same command continues


class Saver:
    """Saves a run between two steps; with several processes, all of them must call it at the same step.

    Args:
      checkpoints: checkpoints of the run.
      batches: batches of the run, whose position is saved with the state.
      run: the run, whose configuration is saved with the state.
      logger: writes the metrics of the saved step, and counts the time that the loop waits.
    """

    def __init__(self, checkpoints: Checkpoints, batches: Batches, run: Run, logger: MetricLogger):
        self._checkpoints, self._batches, self._run, self._logger = checkpoints, batches, run, logger

    def save(self, step: int, state: TrainState, *, wait: bool) -> None:
        """Saves the state; a step that is already saved is left unchanged.

        Args:
          step: number of the step.
          state: the state after this step.
          wait: return only when the checkpoint is on disk. False: it is written while the next steps run.

        Raises:
          RunError: the checkpoint, or the one before it, could not be written.
        """
        self._logger.flush()
        with self._logger.phase("checkpoint"):
            self._checkpoints.save(step, state, self._batches.get_state(), self._run.config)
            if wait:
                self._checkpoints.wait()

    def save_and_exit(self, step: int, state: TrainState, asked_by: str) -> NoReturn:
        """Saves the state unless it is saved, and ends the process so that the same command continues the run.

        Args:
          step: number of the step.
          state: the state after this step.
          asked_by: the signal that asked for the end, as ``Interruption.asked_by`` names it.

        Raises:
          RunError: the checkpoint could not be written.
          SystemExit: always, with code 75.
        """
        self.save(step, state, wait=True)
        report_checkpoint(step)
        console.print(f"{asked_by}: saved step {step}; the same command continues from there")
        raise SystemExit(EXIT_INTERRUPTED)
