"""Streams the tables of a corpus: batches, counts, random rows, the largest clusters.

The memory grows only with the number of rules and sources, not with the number of documents.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

REMOVED, SCORES = "removed.parquet", "scores.parquet"
_BATCH = 1 << 15


def batches(corpus: Path, table: str, columns: Sequence[str] | None = None) -> Iterator["pa.RecordBatch"]:
    """Yields the rows of a table of a corpus in batches.

    Args:
      corpus: the folder of the corpus.
      table: file name of the table.
      columns: names of the columns; those that the table lacks are ignored. None: all columns.

    Raises:
      CorpusError: the table is missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = corpus / table
    if not path.is_file():
        raise CorpusError(f"{path} is missing; build the corpus again")
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = names if columns is None else [name for name in columns if name in names]
            yield from file.iter_batches(batch_size=_BATCH, columns=wanted)
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read ({error}); build the corpus again") from error


def column_names(corpus: Path, table: str) -> list[str]:
    """Returns the names of the columns of a table. Raises CorpusError like ``batches``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = corpus / table
    if not path.is_file():
        raise CorpusError(f"{path} is missing; build the corpus again")
    try:
        return pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{path} cannot be read ({error}); build the corpus again") from error


def count_removed(corpus: Path) -> Counter[tuple[str, str]]:
    """Returns the number of removed documents for each (rule, source)."""
    counts: Counter[tuple[str, str]] = Counter()
    for batch in batches(corpus, REMOVED, ["rule", "source"]):
        grouped = _table(batch).group_by(["rule", "source"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            counts[row["rule"], row["source"]] += row["count_all"]
    return counts


@dataclass
class RandomRows:
    """A uniform sample of the rows of each group, without replacement: the rows with the smallest random keys.

    The sample does not depend on the division of the rows into batches.

    Attributes:
      size: number of rows per group.
      seed: seed of the random keys.
      group: the column by which rows are grouped. None: one sample of all rows.
    """

    size: int
    seed: int
    group: str | None = "rule"
    _kept: dict[str | None, list[tuple[float, int, dict]]] = field(default_factory=dict)
    _seen: int = 0

    def __post_init__(self):
        self._random = np.random.default_rng(self.seed)

    def add(self, batch: "pa.RecordBatch") -> None:
        import pyarrow as pa

        keys = self._random.random(batch.num_rows)
        names, labels = [None], np.zeros(batch.num_rows, np.int64)
        if self.group is not None:
            encoded = batch.column(self.group).dictionary_encode()
            names, labels = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
        for number, name in enumerate(names):
            kept = self._kept.setdefault(name, [])
            limit = kept[-1][0] if len(kept) == self.size else np.inf
            rows = np.flatnonzero((labels == number) & (keys < limit))
            rows = rows[np.argsort(keys[rows], kind="stable")[: self.size]]
            found = batch.take(pa.array(rows)).to_pylist()
            kept += [(keys[row], self._seen + row, values) for row, values in zip(rows, found, strict=True)]
            kept.sort(key=lambda entry: entry[:2])
            del kept[self.size :]
        self._seen += batch.num_rows

    def rows(self) -> dict[str | None, list[dict[str, Any]]]:
        """Returns the sampled rows of each group, in random order."""
        return {name: [values for *_, values in kept] for name, kept in self._kept.items()}


@dataclass
class Cluster:
    """A cluster of near duplicates.

    Attributes:
      id: id of the cluster, which is the id of the kept document.
      size: number of documents, including the kept one.
      removed, n_bytes: number of removed documents, and their bytes.
      members: some of the removed rows; those with a diff come first.
    """

    id: str
    size: int
    removed: int = 0
    n_bytes: int = 0
    members: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class LargestClusters:
    """Finds the ``count`` largest clusters among the removed rows; among equally large ones, those with smallest id."""

    count: int = 10
    members: int = 3
    _found: dict[str, Cluster] = field(default_factory=dict)

    def add(self, batch: "pa.RecordBatch") -> None:
        import pyarrow.compute as pc  # makes its functions when it is imported

        if "cluster" not in batch.schema.names:
            return
        table = _table(batch).filter(batch.column("cluster").is_valid())
        grouped = table.group_by("cluster").aggregate([("cluster_size", "max"), ("bytes", "sum"), ([], "count_all")])
        order = [("cluster_size_max", "descending"), ("cluster", "ascending")]
        # A cluster among the largest ones overall is among them in every batch, so that it is never dropped.
        for row in grouped.sort_by(order).slice(0, self.count).to_pylist():
            size = row["cluster_size_max"]
            cluster = self._found.setdefault(row["cluster"], Cluster(row["cluster"], size))
            cluster.removed += row["count_all"]
            cluster.n_bytes += row["bytes_sum"]
        largest = sorted(self._found.values(), key=lambda cluster: (-cluster.size, cluster.id))[: self.count]
        self._found = {cluster.id: cluster for cluster in largest}
        for cluster in largest:
            rows = table.filter(pc.equal(table.column("cluster"), cluster.id))  # ty: ignore[missing-attribute]  # as above
            shown = rows.sort_by([("diff", "ascending")]).slice(0, self.members).to_pylist()  # null is sorted last
            cluster.members = sorted(cluster.members + shown, key=lambda row: row["diff"] is None)[: self.members]

    def clusters(self) -> list[Cluster]:
        return list(self._found.values())


def visible(text: str) -> str:
    """Replaces control characters except newline and tab, so that a text cannot control a terminal or a browser."""
    return text.translate(_PICTURES)


def total(counts: Mapping[tuple[str, str], int], *, rule: str | None = None, source: str | None = None) -> int:
    """Sums the counts of ``count_removed`` for a rule and a source; None stands for all."""
    return sum(n for (r, s), n in counts.items() if rule in (None, r) and source in (None, s))


def _table(batch: "pa.RecordBatch") -> "pa.Table":
    import pyarrow as pa

    return pa.Table.from_batches([batch])


# C0 characters have symbols in Unicode; DEL, C1 and the marks of text direction become the replacement character.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys([*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
