"""Where metrics go beside the run directory: a tracker, a file in another form, a queue."""

from collections.abc import Mapping
from pathlib import Path


class MetricSink:
    """Base of every sink, those of forks too. An exception that a sink raises ends the run."""

    def start(self, run: Path, after_step: int) -> None:
        """Called once, before the first row.

        Args:
          run: the directory.
          after_step: the step that was restored, 0 for a new run. Rows of later steps, which an earlier process may
            have given to the sink, are written again: take those back here, or let a later row of a step replace them.
        """

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """A row as in ``metrics.jsonl``.

        Args:
          step: its number, from 1. Rows come in order, a training step's one step late.
          values: figures by name, units in the names; NaN and infinities are as they were measured.
          split: "train" or "validation".
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called once, after the last row, also where the run ends early."""
