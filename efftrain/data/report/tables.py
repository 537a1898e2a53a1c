"""Streams over the tables of a corpus: batches, counts, random rows, the largest clusters.

Nothing here grows with the corpus but by the number of rules and sources.
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
    """The rows of one table of a corpus, in pieces.

    Args:
      columns: those wanted; one that the table lacks is left out.

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
    """Raises CorpusError as ``batches`` does."""
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
    """(rule, source) -> how many documents were removed."""
    counts: Counter[tuple[str, str]] = Counter()
    for batch in batches(corpus, REMOVED, ["rule", "source"]):
        grouped = _table(batch).group_by(["rule", "source"]).aggregate([([], "count_all")])
        for row in grouped.to_pylist():
            counts[row["rule"], row["source"]] += row["count_all"]
    return counts


@dataclass
class RandomRows:
    """Uniform samples without replacement, one a group: of rows with random keys, those with the smallest.

    How the rows are cut into batches changes nothing.

    Attributes:
      size: rows a group.
      seed: another seed, another choice.
      group: the column that tells the groups apart; None for one sample of all rows.
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
        """group -> rows, in random order."""
        return {name: [values for *_, values in kept] for name, kept in self._kept.items()}


@dataclass
class Cluster:
    """Near duplicates that were found together.

    Attributes:
      size: documents, with those that were kept.
      removed, n_bytes: documents removed, and their bytes.
      members: some of the removed rows, those with a diff first.
    """

    id: str
    size: int
    removed: int = 0
    n_bytes: int = 0
    members: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class LargestClusters:
    """The ``count`` largest clusters among the removed rows; of equal size, those with the smallest id."""

    count: int = 10
    members: int = 3
    _found: dict[str, Cluster] = field(default_factory=dict)

    def add(self, batch: "pa.RecordBatch") -> None:
        import pyarrow.compute as pc

        if "cluster" not in batch.schema.names:
            return
        table = _table(batch).filter(pc.is_valid(batch.column("cluster")))
        grouped = table.group_by("cluster").aggregate([("cluster_size", "max"), ("bytes", "sum"), ([], "count_all")])
        order = [("cluster_size_max", "descending"), ("cluster", "ascending")]
        # A cluster that is among the largest in the end was so in every batch and after each: it is never dropped.
        for row in grouped.sort_by(order).slice(0, self.count).to_pylist():
            size = row["cluster_size_max"]
            cluster = self._found.setdefault(row["cluster"], Cluster(row["cluster"], size))
            cluster.removed += row["count_all"]
            cluster.n_bytes += row["bytes_sum"]
        largest = sorted(self._found.values(), key=lambda cluster: (-cluster.size, cluster.id))[: self.count]
        self._found = {cluster.id: cluster for cluster in largest}
        for cluster in largest:
            rows = table.filter(pc.equal(table.column("cluster"), cluster.id))
            shown = rows.sort_by([("diff", "ascending")]).slice(0, self.members).to_pylist()  # null comes last
            cluster.members = sorted(cluster.members + shown, key=lambda row: row["diff"] is None)[: self.members]

    def clusters(self) -> list[Cluster]:
        return list(self._found.values())


def visible(text: str) -> str:
    """Control characters but newline and tab as pictures: a removed text must not steer a terminal or a browser."""
    return text.translate(_PICTURES)


def total(counts: Mapping[tuple[str, str], int], *, rule: str | None = None, source: str | None = None) -> int:
    """Of what ``count_removed`` gave, the rows with this rule and source."""
    return sum(n for (r, s), n in counts.items() if rule in (None, r) and source in (None, s))


def _table(batch: "pa.RecordBatch") -> "pa.Table":
    import pyarrow as pa

    return pa.Table.from_batches([batch])


# C0 has pictures of its own; DEL, C1 and the marks that reverse the direction of text become the replacement character.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys([*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
