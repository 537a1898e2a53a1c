"""What was removed and why, as a Parquet table that can be opened beside the corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXCERPT = 200  # characters of the removed text that are kept


class ExclusionLog:
    """Rows of ``removed.parquet``, written as they come.

    id, source, rule, score, bytes, excerpt; for duplicates the survivor; for near duplicates the estimated similarity
    beside the exact one, which is the score, the bands in which both agree, the cluster, its size, and for some a diff.
    """

    def __init__(self, path: Path):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._schema = pa.schema(
            [
                ("id", pa.string()),
                ("source", pa.string()),
                ("rule", pa.string()),
                ("score", pa.float64()),
                ("survivor", pa.string()),
                ("bytes", pa.int64()),
                ("excerpt", pa.string()),
                ("estimated", pa.float32()),
                ("bands", pa.int32()),
                ("cluster", pa.string()),
                ("cluster_size", pa.int32()),
                ("diff", pa.string()),
            ]
        )
        self._batch = pa.RecordBatch
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict] = []

    def add(
        self,
        *,
        id: str,
        source: str,
        rule: str,
        n_bytes: int,
        text: str,
        score: float | None = None,
        survivor: str | None = None,
        **near_duplicate: Any,
    ) -> None:
        """``text`` is what the excerpt is taken from, or the message of the reader."""
        row = {"id": clean(id), "source": clean(source), "rule": rule, "score": score, "survivor": survivor}
        self._rows.append(row | {"bytes": n_bytes, "excerpt": clean(text[:EXCERPT])} | near_duplicate)
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_batch(self._batch.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


def join_tables(parts: Iterable[Path], out: Path) -> None:
    """Writes the rows of all parts, which have the same columns, into one Parquet file."""
    import pyarrow.parquet as pq

    parts = list(parts)
    with pq.ParquetWriter(out, pq.read_schema(parts[0]), compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(batch_size=1 << 14):
                    writer.write_batch(batch)


def clean(text: str) -> str:
    """Half a surrogate pair, as in the name of a badly encoded file, cannot be written and becomes a question mark."""
    return text.encode(errors="replace").decode()
