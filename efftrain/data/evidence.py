"""What was removed and why, as a Parquet table that can be opened beside the corpus."""

from pathlib import Path

EXCERPT = 200  # characters of the removed text that are kept


class Evidence:
    """Rows of ``removed.parquet``: id, source, rule, score, survivor, bytes, excerpt.

    Written as they come.
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
    ) -> None:
        """``text`` is what the excerpt is taken from, or the message of the reader."""
        values = (_clean(id), _clean(source), rule, score, survivor, n_bytes, _clean(text[:EXCERPT]))
        self._rows.append(dict(zip(self._schema.names, values, strict=True)))
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_batch(self._batch.from_pylist(self._rows, schema=self._schema))
        self._rows.clear()


def _clean(text: str) -> str:
    """Half a surrogate pair, as in the name of a badly encoded file, cannot be written and becomes a question mark."""
    return text.encode(errors="replace").decode()
