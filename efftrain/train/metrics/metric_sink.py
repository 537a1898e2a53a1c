"""Metric sinks: further destinations of the metrics, such as a tracker, a file in another format or a queue."""

from collections.abc import Mapping
from pathlib import Path


class MetricSink:
    """Base class of every sink; a fork derives its own from it. An exception that a sink raises ends the run."""

    def start(self, run: Path, after_step: int) -> None:
        """Called once, before the first row.

        Args:
          run: the run directory.
          after_step: step that was restored, 0 for a new run. Rows of later steps, which an earlier process may have
            given to the sink, are written again: remove those here, or let the later row of a step replace them.
        """

    def write(self, step: int, values: Mapping[str, float], split: str) -> None:
        """Called for each row of ``metrics.jsonl``.

        Args:
          step: number of the step, from 1. Rows come in order; that of a training step comes one step late.
          values: figures by name, with the units in the names; NaN and infinities are passed as they were measured.
          split: "train" or "validation".
        """
        raise NotImplementedError

    def close(self) -> None:
        """Called once, after the last row, even if the run ends early."""
