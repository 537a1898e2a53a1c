"""Records which documents were removed and why, as a Parquet table beside the corpus."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXCERPT = 200  # number of characters of a removed text that are recorded


class ExclusionLog:
    """Writes the rows of ``removed.parquet`` incrementally.

    Each row has id, source, rule, score, bytes and excerpt. A duplicate also has its survivor, the document that is
    kept. A near duplicate also has the estimated similarity (the exact one is the score), the number of bands in which
    both agree, the cluster and its size, and for some documents a diff.
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
        """Adds a row.

        Args:
          id: the id of the document.
          source: name of its source.
          rule: the rule or stage that removed it.
          n_bytes: size of the text in bytes.
          text: the removed text, of which an excerpt is recorded, or the message of a reader.
          score: the score that the rule gave.
          survivor: id of the document that is kept, for duplicates.
          **near_duplicate: the further columns for near duplicates.
        """
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
    """Writes the rows of all parts, which have the same columns, to one Parquet file."""
    import pyarrow.parquet as pq

    parts = list(parts)
    with pq.ParquetWriter(out, pq.read_schema(parts[0]), compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(batch_size=1 << 14):
                    writer.write_batch(batch)


def clean(text: str) -> str:
    """Replaces unpaired surrogates, as in the name of a badly encoded file, which cannot be written, by "?"."""
    return text.encode(errors="replace").decode()
