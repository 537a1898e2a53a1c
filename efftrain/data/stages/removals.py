"""The documents that later stages remove: each leaves the evidence, and the corpus knows who is left."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.stages.exclusion_log import ExclusionLog
from efftrain.data.stages.filter_statistics import FilterStatistics, example
from efftrain.data.stages.kept_documents import KeptDocuments
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import stem


class Removal:
    """What one item of a stage removes: ``NNNNNN.removed.parquet`` and ``NNNNNN.gone.npy``."""

    def __init__(self, folder: Path, number: int):
        self._path = folder / stem(number)
        self._evidence = ExclusionLog(Path(f"{self._path}.removed.parquet"))
        self._funnels, self._gone = FilterStatistics(), []

    def add(self, number: int, record: bytes, rule: str, **evidence: Any) -> None:
        """Removes document ``number``, whose record is given; ``evidence`` as for ``ExclusionLog.add``."""
        id, source, _, utf8 = unpack_record(record)
        text = utf8.decode()
        self._gone.append(number)
        self._funnels.drop(source, rule, len(utf8), example(id, text))
        self._evidence.add(id=id, source=source, rule=rule, n_bytes=len(utf8), text=text, **evidence)

    def cut(self, record: bytes, rule: str, n_bytes: int) -> None:
        """Counts bytes that the text of a document lost which stays."""
        self._funnels.cut(unpack_record(record)[1], rule, n_bytes)

    def close(self) -> dict[str, Any]:
        """The item's summary."""
        self._evidence.close()
        np.save(f"{self._path}.gone.npy", np.array(self._gone, np.int64))
        return {"removed": len(self._gone), "sources": self._funnels.to_json()}


class Survivors:
    """Which of the documents that were read are still there.

    Attributes:
      alive: (documents,) bool.
      funnels: what was seen and dropped so far.
      evidence: the Parquet files that say why.
    """

    def __init__(self, kept: KeptDocuments, read: Sequence[dict[str, Any]]):
        self.kept, self.alive = kept, np.ones(len(kept), bool)
        self.funnels = FilterStatistics()
        self.evidence = [kept.folder / f"{stem(number)}.removed.parquet" for number in range(kept.n_pieces)]
        for summary in read:
            self.funnels.add(summary["sources"])

    def apply(self, folder: Path, summaries: Sequence[dict[str, Any]]) -> int:
        """Takes over what the items of a stage removed; returns how many documents that were."""
        for number, summary in enumerate(summaries):
            self.funnels.add(summary["sources"])
            if summary["removed"]:
                self.evidence.append(folder / f"{stem(number)}.removed.parquet")
                self.alive[np.load(folder / f"{stem(number)}.gone.npy")] = False
        return sum(summary["removed"] for summary in summaries)

    def save(self, path: Path) -> Path:
        """The mask as a file that items can map."""
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, self.alive)
        return path
