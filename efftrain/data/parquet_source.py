"""Documents from columns: Parquet files, and what every table of documents shares."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import RANGE_BYTES, FileSource, Piece, as_document, named_files, ranges_of
from efftrain.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 256  # rows that are decoded together


@dataclass(frozen=True, kw_only=True)
class Columns(FileSource):
    """A table of documents on disk, one row a document; a row is named ``file:row``.

    Attributes:
      path: where it is.
      column: the column that holds the text.
      id_column: the column that holds the id; by default ``file:row``.
      package_column: the column that names the group which must stay in one split.
    """

    path: Path
    column: str = "text"
    id_column: str | None = None
    package_column: str | None = None

    def columns(self, path: Path, found: Sequence[str]) -> list[str]:
        """The columns to read.

        Raises CorpusError where ``found`` lacks one.
        """
        wanted = list(dict.fromkeys(c for c in (self.column, self.id_column, self.package_column) if c))
        if missing := [c for c in wanted if c not in found]:
            raise CorpusError(f"{path} has no column {missing[0]!r}; it has {', '.join(found)}")
        return wanted

    def rows(self, name: str, first: int, batch: "pa.RecordBatch") -> Iterator[Document | Skipped]:
        """The documents of a batch that begins at row ``first`` of the file ``name``."""
        for start in range(0, len(batch), _ROWS):
            piece = batch.slice(start, _ROWS)
            texts, ids, packages = (
                piece.column(c) if c else None for c in (self.column, self.id_column, self.package_column)
            )
            for row in range(len(piece)):
                place = f"{name}:{first + start + row}"
                try:
                    text = texts[row].as_py()
                except UnicodeDecodeError as error:  # Arrow does not look into its strings when it reads them
                    yield Skipped(place, self.path.name, "undecodable", str(error), len(error.object))
                    continue
                meta = {"package": str(packages[row])} if packages else {}
                yield as_document(str(ids[row]) if ids else place, self.path.name, text, meta, place)


@dataclass(frozen=True, kw_only=True)
class Parquet(Columns):
    """A file or a folder of ``.parquet`` files. The attributes are those of ``Columns``."""

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from named_files(self.path, (".parquet",))

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Ranges of row groups."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if size <= RANGE_BYTES:
            return [(0, None)]
        try:
            with pq.ParquetFile(path) as file:
                return ranges_of(file.metadata.row_group(g).total_byte_size for g in range(file.num_row_groups))
        except (OSError, pa.ArrowException):  # the reader will list it
            return [(0, None)]

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        for name, path in piece.files:
            try:
                with pq.ParquetFile(path) as file:
                    columns = self.columns(path, file.schema_arrow.names)
                    counts = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
                    for group in range(len(counts))[piece.start : piece.stop]:
                        yield from self._group(file, name, group, sum(counts[:group]), columns)
            except (OSError, pa.ArrowException) as error:
                yield Skipped(name, self.path.name, "unreadable", str(error))

    def _group(self, file, name: str, group: int, row: int, columns: list[str]) -> Iterator[Document | Skipped]:
        """A group that is damaged is skipped from there on; the next one stands by itself."""
        import pyarrow as pa

        try:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns):
                yield from self.rows(name, row, batch)
                row += len(batch)
        except (OSError, pa.ArrowException) as error:
            detail = f"row group {group} from this row on: {error}"
            yield Skipped(f"{name}:{row}", self.path.name, "unreadable", detail)
