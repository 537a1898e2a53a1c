"""The rows of a corpus that a compression reads: for calibration, for choices and for reports."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import efftrain
from efftrain.compress.layerwise.calibration import CalibrationRows
from efftrain.errors import ConfigError
from efftrain.measure.quality.held_out import HeldOut, choosing, reporting
from efftrain.models.decoder import Decoder
from efftrain.progress import console


def check_rows(rows: int) -> None:
    """Raises ConfigError unless there is at least one row."""
    if rows < 1:
        raise ConfigError(f"--rows is {rows}; give at least 1")


@dataclass(frozen=True)
class CorpusRows:
    """A corpus, read in rows of ``length`` tokens."""

    corpus: Path
    length: int

    def choosing(self, rows: int | None = None) -> HeldOut:
        """The rows on which shapes or formats are chosen: the first ones of the validation split."""
        return choosing(self.corpus, self.length, rows)

    def reporting(self, rows: int | None = None, *, chosen: int = 0) -> HeldOut:
        """The rows on which a result is reported; see ``measure.quality.held_out.reporting``."""
        return reporting(self.corpus, self.length, rows, chosen=chosen)

    def before_and_after(self, run: Path, model: Decoder, rows: int) -> dict[str, Any]:
        """Bits per byte of a run and of the model made from it, on ``rows`` validation rows, as JSON for the report."""
        held_out = self.choosing(rows)
        evaluate = held_out.evaluator()
        bpb = {name: evaluate(of)["bpb"] for name, of in (("bpb_before", efftrain.load(run)), ("bpb", model))}
        return {"split": held_out.split, "rows": rows} | bpb

    def calibration(self, rows: int) -> CalibrationRows:
        """The first ``rows`` rows of the training split, for calibration; prints a warning if it has fewer.

        Raises:
          ConfigError: the split is shorter than one row.
        """
        held = HeldOut(corpus=self.corpus, length=self.length, split="train", rows=rows)
        batches = list(held.batches())
        if not batches:
            raise ConfigError(f"{self.corpus}: the training split is shorter than one row of {self.length} tokens")
        names = ("tokens", "segments", "positions")
        arrays = [np.concatenate([b[name] for b in batches])[:rows] for name in names]
        valid = (arrays[1] > 0).any(1)  # the last batch is filled up with padding
        found = CalibrationRows(*(array[valid] for array in arrays), rows_asked=rows)
        if found.size.rows < rows:
            console.print(
                f"warning: {self.corpus}: the training split has {found.size.rows} rows of {self.length} tokens and "
                f"{rows} were asked for; calibrating on these, {found.size.tokens:,} tokens",
                style="yellow",
                markup=False,
            )
        return found
