"""Writes and reads ``scores.parquet``: every document that was read, with the score of each rule.

The scores are used in the report, and in later builds that change only thresholds.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from efftrain.data.documents import Document
from efftrain.data.rules import Edit, Rule, is_edit
from efftrain.data.stages.exclusion_log import clean

Known = Mapping[str, dict[str, float] | None]


class RuleScores:
    """Writes rows of id, source, bytes, rejected_by, and a column per rule (null if a rule raised an exception)."""

    def __init__(self, path: Path, rules: Sequence[Rule | Edit]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._names = score_names(rules)
        fixed = [("id", pa.string()), ("source", pa.string()), ("bytes", pa.int64()), ("rejected_by", pa.string())]
        self._schema = pa.schema(fixed + [(name, pa.float64()) for name in self._names])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[tuple] = []
        self.n_rows = 0

    def add(
        self, document: Document, n_bytes: int, scores: Mapping[str, float] | None, rejected_by: str | None
    ) -> None:
        """Adds a row; ``scores`` is None if a rule raised an exception."""
        values = [scores[name] if scores else None for name in self._names]
        self._rows.append((clean(document.id), clean(document.source), n_bytes, rejected_by, *values))
        self.n_rows += 1
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows.clear()


def score_names(rules: Sequence[Rule | Edit]) -> list[str]:
    """Returns the names of flattened rules without edits; these are the columns of their scores."""
    return [rule.name for rule in rules if not is_edit(rule)]


def read_scores(path: Path, start: int, names: Sequence[str]) -> Iterator[Known]:
    """Yields {id: scores} for each row from ``start`` on; the scores are None if a rule raised an exception.

    Looking up the id of a document checks that the row belongs to it.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if n_rows <= start:
                start -= n_rows
                continue
            table = file.read_row_group(group, columns=["id", *names]).slice(start)
            start = 0
            columns = [table.column(name).to_pylist() for name in names]
            for id, *values in zip(table.column("id").to_pylist(), *columns, strict=True):
                yield {id: None if None in values else dict(zip(names, values, strict=True))}
