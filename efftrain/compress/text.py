"""The text that a compression looks at."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from efftrain import data
from efftrain.compress.observe import Calibration
from efftrain.errors import ConfigError
from efftrain.measure.evaluate import Evaluator
from efftrain.progress import console


@dataclass(frozen=True)
class Text:
    """Rows of a corpus, of so many tokens."""

    corpus: Path
    length: int

    def evaluator(self, max_rows: int | None = None) -> Evaluator:
        opened = data.open(self.corpus)
        max_batches = None if max_rows is None else -(-max_rows // 8)
        return Evaluator(lambda: self._batches("validation"), opened.token_bytes(), max_batches=max_batches)

    def calibration(self, rows: int) -> Calibration:
        """Rows of the training split; says where there are fewer than asked for."""
        batches = list(itertools.islice(self._batches("train"), -(-rows // 8)))
        if not batches:
            raise ConfigError(f"{self.corpus}: the training split is shorter than one row of {self.length} tokens")
        names = ("tokens", "segments", "positions")
        arrays = [np.concatenate([b[name] for b in batches])[:rows] for name in names]
        valid = (arrays[1] > 0).any(1)  # the last batch is filled up with padding
        found = Calibration(*(array[valid] for array in arrays), rows_asked=rows)
        if found.size.rows < rows:
            console.print(
                f"warning: {self.corpus}: the training split has {found.size.rows} rows of {self.length} tokens and "
                f"{rows} were asked for; calibrating on these, {found.size.tokens:,} tokens",
                style="yellow",
                markup=False,
            )
        return found

    def _batches(self, split: str):
        loader = data.LoaderConfig(
            corpora=(data.Part(path=self.corpus),),
            length=self.length,
            batch_size=8,
            split=split,
            shuffle=False,
            repeat=False,
        )
        return data.batches(loader, verify=False)
