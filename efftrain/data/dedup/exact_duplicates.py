"""Provides the stage that removes exact duplicates of the normalised text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.dedup.exact import survivors
from efftrain.data.stages.kept_documents import KeptDocuments, Reader
from efftrain.data.stages.removals import ExcludedDocuments, Survivors
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import Engine, run_stage

EXACT_DUPLICATE = "exact_duplicate"


@dataclass(frozen=True)
class DropRepeats:
    """Task: writes the evidence of the duplicates in piece ``number``.

    Attributes:
      kept: the documents.
      survivors: .npy (documents,) int64, the number of the document that is kept instead of each document.
      repeats: .npy (documents,) bool, True for documents that are removed.
    """

    kept: KeptDocuments
    survivors: Path
    repeats: Path

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        first, repeats = (np.load(path, mmap_mode="r") for path in (self.survivors, self.repeats))
        excluded = ExcludedDocuments(folder, number)
        with Reader(self.kept) as reader:
            for document, record in self.kept.records(repeats, number):
                survivor = unpack_record(reader.record(int(first[document])))[0]
                excluded.add(document, record, EXACT_DUPLICATE, score=1.0, survivor=survivor)
        return excluded.close()


def remove_exact_duplicates(engine: Engine, work: Path, left: Survivors, *, within_source: bool) -> None:
    """Keeps the first of several documents with the same text; with ``within_source``, the first of each source."""
    folder = work / "repeats"
    folder.mkdir(exist_ok=True)
    high = left.kept.column("digest_high")
    if within_source:
        high ^= left.kept.column("source")
    first = survivors(high, left.kept.column("digest_low"))
    np.save(folder / "survivors.npy", first)
    np.save(folder / "repeats.npy", first != np.arange(len(first)))
    task = DropRepeats(left.kept, folder / "survivors.npy", folder / "repeats.npy")
    left.apply(work / "exact", run_stage(engine, work, "exact", task, left.kept.n_pieces, "Removing repeats"))
