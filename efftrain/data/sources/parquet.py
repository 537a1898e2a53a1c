"""Reads documents from the rows of Parquet files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import Piece, file_size, named_files, ranges_of
from efftrain.data.sources.columns import ROWS, Columns

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


@dataclass(frozen=True, kw_only=True)
class Parquet(Columns):
    """Reads documents from a ``.parquet`` file, or from all such files below a folder.

    The attributes are those of ``Columns``. A file that cannot be read or has no text column is reported as
    unreadable. Of a damaged row group, the rest is reported as unreadable, and reading continues with the next group.
    """

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from named_files(self.path, (".parquet",))

    def schema(self, path: Path) -> "pa.Schema":
        import pyarrow.parquet as pq

        return pq.read_schema(path)

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Returns ranges of row groups."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if size <= sources.RANGE_BYTES:
            return [(0, None)]
        try:
            with pq.ParquetFile(path) as file:
                return ranges_of(file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups))
        except (OSError, pa.ArrowException):  # reported when the documents are read
            return [(0, None)]

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, path in piece.files:
            try:
                with pq.ParquetFile(path) as file:
                    columns = self.columns(file.schema_arrow)
                    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                    for group in range(len(counts))[piece.start : piece.stop]:
                        yield from self._group(file, name, group, sum(counts[:group]), columns)
            except (OSError, LookupError, pa.ArrowException) as error:
                yield self.lost(name, error, file_size(path))

    def _group(
        self, file: "pq.ParquetFile", name: str, group: int, row: int, columns: list[str]
    ) -> Iterator[Document | Skipped]:
        """Yields the documents of a row group. If it is damaged, the rest of the group is reported as lost."""
        import pyarrow as pa

        whole, first = file.metadata.row_group(group), row
        try:
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=columns):
                yield from self.rows(name, row, batch)
                row += len(batch)
        except (OSError, pa.ArrowException) as error:
            left = whole.total_byte_size * (first + whole.num_rows - row) // max(whole.num_rows, 1)
            yield self.lost(f"{name}:{row}", f"row group {group} from this row on: {error}", left)
