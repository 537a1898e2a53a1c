"""The stage that removes repeats of the same normalised text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.dedup import survivors
from efftrain.data.reading import Kept
from efftrain.data.removals import Removal, Survivors, alive_records
from efftrain.data.spool import unpack_record
from efftrain.data.stages import Engine, run_stage

EXACT_DUPLICATE = "exact_duplicate"


@dataclass(frozen=True)
class DropRepeats:
    """Writes the evidence of the repeats in piece ``number``.

    Attributes:
      survivors: .npy (documents,) int64.
    """

    kept: Kept
    survivors: Path

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        first = np.load(self.survivors, mmap_mode="r")
        removal = Removal(folder, number)
        for document, record in alive_records(self.kept, first != np.arange(len(first)), number):
            survivor = unpack_record(self.kept.record(int(first[document])))[0]
            removal.add(document, record, EXACT_DUPLICATE, score=1.0, survivor=survivor)
        return removal.close()


def remove_exact_duplicates(engine: Engine, work: Path, left: Survivors) -> None:
    """Of documents with the same text the first is kept."""
    path = work / "survivors.npy"
    np.save(path, survivors(left.kept.column("digest_high"), left.kept.column("digest_low")))
    task = DropRepeats(left.kept, path)
    left.apply(work / "exact", run_stage(engine, work, "exact", task, left.kept.n_pieces, "Removing repeats"))
