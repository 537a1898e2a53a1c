"""Reads documents from Arrow IPC files, in the file format (Feather) and in the stream format."""

import contextlib
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import Piece, file_size, named_files, ranges_of
from efftrain.data.sources.columns import Columns

if TYPE_CHECKING:
    import pyarrow as pa

_FILE_FORMAT = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, kw_only=True)
class Arrow(Columns):
    """Reads documents from an ``.arrow`` or ``.feather`` file, or from all such files below a folder.

    The attributes are those of ``Columns``. A file that cannot be read or has no text column is reported as
    unreadable. Of a truncated stream, the part before the cut is read and the rest is reported as unreadable.
    """

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from named_files(self.path, (".arrow", ".feather"))

    def schema(self, path: Path) -> "pa.Schema":
        with _batches(path) as (schema, _):
            return schema

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Returns ranges of record batches. Only the headers are read for this, unless the batches are compressed."""
        import pyarrow as pa

        if size <= sources.RANGE_BYTES:
            return [(0, None)]
        try:
            with _batches(path) as (_, batches):
                return ranges_of(batch.nbytes for batch in batches)
        except (OSError, pa.ArrowException):  # reported when the documents are read
            return [(0, None)]

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        import pyarrow as pa

        for name, path in piece.files:
            row = 0
            try:
                with _batches(path) as (schema, batches):
                    columns = list(dict.fromkeys(_outer(column, schema) for column in self.columns(schema)))
                    for number, batch in enumerate(batches):
                        if piece.stop is not None and number >= piece.stop:
                            break
                        if number >= piece.start:
                            yield from self.rows(name, row, batch.select(columns))
                        row += len(batch)
            except (OSError, LookupError, pa.ArrowException) as error:
                what = f"from row {row} on: {error}" if row else str(error)
                yield self.lost(f"{name}:{row}", what, 0 if row else file_size(path))


def _outer(column: str, schema: "pa.Schema") -> str:
    """Returns the column itself, or the struct column that contains it."""
    return column if column in schema.names else column.partition(".")[0]


@contextlib.contextmanager
def _batches(path: Path) -> Generator[tuple["pa.Schema", Iterator["pa.RecordBatch"]]]:
    """Opens a file of either format as its schema and record batches. The end of a stream is checked after its last."""
    import pyarrow as pa

    if not file_size(path):
        path.open("rb").close()  # raises the reason why it cannot be opened; an empty file cannot be mapped
        raise OSError("the file is empty")
    with pa.memory_map(str(path)) as file:
        if file.read(len(_FILE_FORMAT)) == _FILE_FORMAT:
            reader = pa.ipc.open_file(file)
            yield reader.schema, map(reader.get_batch, range(reader.num_record_batches))
        else:
            file.seek(0)
            with pa.ipc.open_stream(file) as stream:
                yield stream.schema, _checked(stream, path)


def _checked(stream: "pa.RecordBatchStreamReader", path: Path) -> Iterator["pa.RecordBatch"]:
    """Yields the batches and raises OSError if the stream was cut between two of them, which Arrow does not notice."""
    yield from stream
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM:
            raise OSError("the file is truncated: it has no end-of-stream mark")
