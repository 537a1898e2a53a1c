"""Records the documents that a stage removes, with the reasons, and keeps track of the documents that are left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.stages.exclusion_log import ExclusionLog
from efftrain.data.stages.filter_statistics import FilterStatistics, example
from efftrain.data.stages.kept_documents import KeptDocuments
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import stem


class ExcludedDocuments:
    """Writes the removals of one item of a stage to ``NNNNNN.removed.parquet`` and ``NNNNNN.gone.npy``."""

    def __init__(self, folder: Path, number: int):
        self._path = folder / stem(number)
        self._log = ExclusionLog(Path(f"{self._path}.removed.parquet"))
        self._statistics, self._gone = FilterStatistics(), []

    def add(self, number: int, record: bytes, rule: str, **details: Any) -> None:
        """Removes document ``number`` with the given record; ``details`` are passed to ``ExclusionLog.add``."""
        id, source, _, utf8 = unpack_record(record)
        text = utf8.decode()
        self._gone.append(number)
        self._statistics.drop(source, rule, len(utf8), example(id, text))
        self._log.add(id=id, source=source, rule=rule, n_bytes=len(utf8), text=text, **details)

    def cut(self, record: bytes, rule: str, n_bytes: int) -> None:
        """Counts bytes that were removed from the text of a kept document."""
        self._statistics.cut(unpack_record(record)[1], rule, n_bytes)

    def close(self) -> dict[str, Any]:
        """Closes the files and returns the summary of the item."""
        self._log.close()
        np.save(f"{self._path}.gone.npy", np.array(self._gone, np.int64))
        return {"removed": len(self._gone), "sources": self._statistics.to_json()}


class Survivors:
    """Keeps track of the documents that have not been removed.

    Attributes:
      kept: the documents that the first stage kept.
      alive: (documents,) bool, True for documents that have not been removed since.
      statistics: counts of the documents seen and dropped so far.
      exclusion_logs: the Parquet files with the reasons of the removals.
    """

    def __init__(self, kept: KeptDocuments, read: Sequence[dict[str, Any]]):
        self.kept, self.alive = kept, np.ones(len(kept), bool)
        self.statistics = FilterStatistics()
        self.exclusion_logs = [kept.folder / f"{stem(number)}.removed.parquet" for number in range(kept.n_pieces)]
        for summary in read:
            self.statistics.add(summary["sources"])

    def apply(self, folder: Path, summaries: Sequence[dict[str, Any]]) -> int:
        """Applies the removals of all items of a stage; returns the number of removed documents."""
        for number, summary in enumerate(summaries):
            self.statistics.add(summary["sources"])
            if summary["removed"]:
                self.exclusion_logs.append(folder / f"{stem(number)}.removed.parquet")
                self.alive[np.load(folder / f"{stem(number)}.gone.npy")] = False
        return sum(summary["removed"] for summary in summaries)

    def save(self, path: Path) -> Path:
        """Saves ``alive`` to a file that items can memory-map; returns the path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, self.alive)
        return path
