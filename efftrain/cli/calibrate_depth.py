"""``efftrain calibrate-depth``."""

import sys
from pathlib import Path

from rich.console import Console


def calibrate_depth(
    run: Path,
    /,
    *,
    corpus: Path | None = None,
    exits: tuple[int, ...] = (),
    drafts: tuple[int, ...] = (1, 2, 3, 4, 6),
    prompts: int = 24,
    n_new: int = 64,
    rows: int = 384,
    risk: float = 0.1,
    error: float = 0.05,
    length: int | None = None,
) -> None:
    """Measure how a run's model decodes with fewer layers: self-speculation, exits by confidence, mean depth.

    Leaves depth.json in the run, and figures in its scorecard. When interrupted, the same command continues.

    Args:
      run: the directory of a training run.
      corpus: corpus whose validation split is used to choose and whose test split to report; by default that of the
        run.
      exits: numbers of layers that draft; by default 1 to half of the model's layers.
      drafts: lengths of a draft, in tokens.
      prompts: number of prompts that are continued, one at a time.
      n_new: number of new tokens after each prompt.
      rows: rows of the validation split for the confidence curves; their choices are measured on the test split.
      risk: the share of tokens that an exit may change.
      error: the probability with which an exit may change a larger share.
      length: tokens per row; by default as in the run's training.
    """
    from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
    from efftrain.measure.depth.depth_table import summary

    options = DepthCalibration(
        exits=exits, drafts=drafts, prompts=prompts, n_new=n_new, rows=rows, risk=risk, error=error, length=length
    )
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for table in summary(calibrate(run, options, corpus=corpus)):
        out.print(table)
