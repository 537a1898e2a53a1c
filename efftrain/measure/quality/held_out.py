"""Held-out rows of a corpus: rows for choosing settings, and separate rows for reporting the result."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from efftrain import data
from efftrain.errors import CorpusError
from efftrain.measure.measurements import Measurements
from efftrain.measure.quality.evaluate import Evaluator, NumpyBatch
from efftrain.models.decoder import Decoder

CHOICES, REPORTS = "validation", "test"
ROWS = 8  # rows per batch


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A range of rows of a split, in the order of the corpus.

    Attributes:
      corpus: folder of the corpus.
      length: tokens of a row.
      split: name of the split.
      start: number of rows that are skipped at the beginning; a multiple of the batch size.
      rows: minimum number of rows, because whole batches are read. None: all.
      note: what a reader of the figures must know in addition to the split.
    """

    corpus: Path
    length: int
    split: str
    start: int = 0
    rows: int | None = None
    note: str = ""

    def batches(self, batch_size: int = ROWS, part: tuple[int, int] = (0, 1)) -> Iterator[NumpyBatch]:
        """One pass over the rows in batches.

        Args:
          batch_size: rows of a batch.
          part: the part of each batch that this process reads; see ``data.batches``.
        """
        loader = data.LoaderConfig(
            corpora=(data.Part(path=self.corpus),),
            length=self.length,
            batch_size=batch_size,
            split=self.split,
            shuffle=False,
            repeat=False,
        )
        end = None if self.rows is None else self.start + self.rows
        first, last = self.start // batch_size, None if end is None else -(-end // batch_size)
        return itertools.islice(data.batches(loader, *part, verify=False), first, last)

    def evaluator(self, batch_size: int = ROWS, part: tuple[int, int] = (0, 1)) -> Evaluator:
        max_batches = None if self.rows is None else -(-self.rows // batch_size)
        token_bytes = data.open(self.corpus, verify=False).token_bytes(self.split)
        return Evaluator(lambda: self.batches(batch_size, part), token_bytes, max_batches=max_batches)

    def bits_per_byte(self, models: Mapping[str, Callable[[], Decoder]], store: Measurements) -> dict[str, float]:
        """Measures several models on these rows; each is built, evaluated and released before the next one is built.

        Args:
          models: functions that build the models, by the models' names.
          store: keeps the results under these names, so that an interrupted command does not repeat them.

        Returns:
          The bits per byte of each model; NaN if its loss is not finite.
        """
        evaluate = self.evaluator()
        found = {name: store.cell(name, lambda build=build: evaluate(build())["bpb"]) for name, build in models.items()}
        return {name: math.nan if bpb is None else bpb for name, bpb in found.items()}


def choosing(corpus: Path, length: int, rows: int | None = None) -> HeldOut:
    """The rows on which settings are chosen: the first ``rows`` rows of the validation split, or all if None."""
    return HeldOut(corpus=corpus, length=length, split=CHOICES, rows=rows, note=_first(rows))


def reporting(
    corpus: Path, length: int, rows: int | None = None, *, chosen: int = 0, batch_size: int = ROWS
) -> HeldOut:
    """The rows on which a result is reported: those of the test split.

    If the corpus has no test split of at least one row, the rows are those of the validation split after the rows on
    which something was chosen, and the note says so.

    Args:
      corpus: folder of the corpus.
      length: tokens of a row.
      rows: minimum number of rows. None: all.
      chosen: number of rows, from the start of the validation split, on which something was chosen.
      batch_size: rows of a batch, for the choice and for the report.

    Raises:
      CorpusError: the corpus has neither a test split nor further rows in the validation split.
    """
    opened = data.open(corpus, verify=False)
    if REPORTS in opened.splits and opened.n_tokens(REPORTS) > length:
        return HeldOut(corpus=corpus, length=length, split=REPORTS, rows=rows, note=_first(rows))
    start = -(-chosen // batch_size) * batch_size
    n_rows = len(data.PackedRows(opened, CHOICES, length))
    if n_rows <= start:
        raise CorpusError(
            f"{corpus} has no test split with a row of {length} tokens, and all {n_rows} rows of its validation split "
            "would be used to choose; give fewer --rows, or build the corpus with a test split"
        )
    without = f"without the first {start} rows, on which something was chosen" if start else ""
    note = "; ".join(filter(None, ("the corpus has no test split", without, _first(rows))))
    return HeldOut(corpus=corpus, length=length, split=CHOICES, start=start, rows=rows, note=note)


def _first(rows: int | None) -> str:
    return "" if rows is None else f"{rows:,} rows"
