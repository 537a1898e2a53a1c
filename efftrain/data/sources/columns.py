"""Reads documents from the columns of a table; the base of the Parquet and Arrow sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources.base import PathSource, Piece, as_document
from efftrain.data.sources.metadata import RESERVED, as_name, metadata
from efftrain.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 256  # number of rows that are decoded together


@dataclass(frozen=True, kw_only=True)
class Columns(PathSource):
    """Base class of sources that read tables with one document per row.

    All other columns with scalar values become the ``meta`` of the document, see ``metadata.metadata``. A column
    within a struct column is named with a dot (``data.text``).

    Attributes:
      column: the column that contains the text.
      id_column: the column that contains the id. None, or a missing or null value: the id is ``file:row``.
      group_column: the column that names the group of documents that must stay in one split. None, or a missing or
        null value: the document is a group of its own.
    """

    column: str = "text"
    id_column: str | None = None
    group_column: str | None = None

    def schema(self, path: Path) -> "pa.Schema":
        """Returns the schema of a file. Raises OSError or ArrowException if the file cannot be read."""
        raise NotImplementedError

    def pieces(self) -> Iterator[Piece]:
        """Yields pieces like ``FileSource.pieces``.

        Raises CorpusError if one of the configured columns is in none of the files.
        """
        self._check_columns()
        yield from super().pieces()

    def columns(self, schema: "pa.Schema") -> list[str]:
        """Returns the names of the columns to read: the configured ones and all columns of scalars.

        Raises LookupError if there is no text column.
        """
        if not _has(schema, self.column):
            raise LookupError(f"there is no column {self.column!r}; the columns are: {', '.join(schema.names)}")
        asked = [name for name in self._asked() if _has(schema, name)]
        rest = [field.name for field in schema if _is_scalar(field.type) and field.name not in (*asked, *RESERVED)]
        return asked + rest

    def rows(self, name: str, first: int, batch: "pa.RecordBatch") -> Iterator[Document | Skipped]:
        """Yields the documents of a batch whose first row is row ``first`` of the file ``name``."""
        asked, source = self._asked(), self.source
        scalars = [field.name for field in batch.schema if _is_scalar(field.type) and field.name not in asked]
        for start in range(0, len(batch), ROWS):
            piece = batch.slice(start, ROWS)
            texts = _column(piece, self.column)
            ids, groups = (
                _values(_column(piece, c)) if c and _has(batch.schema, c) else None
                for c in (self.id_column, self.group_column)
            )
            meta = {scalar: _values(piece.column(scalar)) for scalar in scalars}
            for row in range(len(piece)):
                place = f"{name}:{first + start + row}"
                try:
                    text = texts[row].as_py()
                except UnicodeDecodeError as error:  # Arrow does not validate UTF-8 when it reads strings
                    yield Skipped(place, source, "undecodable", str(error), len(error.object))
                    continue
                beside = {}
                if meta or groups:
                    fields = ((key, column[row]) for key, column in meta.items())
                    beside = metadata(fields, (), groups and groups[row])
                yield as_document((as_name(ids[row]) if ids else None) or place, source, text, beside, place)

    def _asked(self) -> list[str]:
        return list(dict.fromkeys(c for c in (self.column, self.id_column, self.group_column) if c))

    def _check_columns(self) -> None:
        """Checks that each configured column is in some file. Unreadable files are reported when they are read."""
        import pyarrow as pa

        missing, seen = self._asked(), None
        for _, path in self.files():
            try:
                schema = self.schema(path)
            except (OSError, pa.ArrowException):
                continue
            seen = seen or (path, schema.names)
            missing = [name for name in missing if not _has(schema, name)]
            if not missing:
                return
        if seen:
            path, names = seen
            raise CorpusError(f"{path} has no column {missing[0]!r}; it has {', '.join(names)}")


def _has(schema: "pa.Schema", name: str) -> bool:
    import pyarrow as pa

    if name in schema.names:
        return True
    first, *inner = name.split(".")
    if first not in schema.names:
        return False
    kind = schema.field(first).type
    for part in inner:
        if not pa.types.is_struct(kind) or kind.get_field_index(part) < 0:
            return False
        kind = kind.field(part).type
    return True


def _column(batch: "pa.RecordBatch", name: str) -> "pa.Array":
    import pyarrow.compute as pc  # makes its functions when it is imported

    if name in batch.schema.names:
        return batch.column(name)
    first, *inner = name.split(".")
    return reduce(pc.struct_field, inner, batch.column(first))  # ty: ignore[missing-attribute]  # as above


def _is_scalar(kind: "pa.DataType") -> bool:
    """Returns whether ``metadata`` keeps values of this type."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return texts or numbers or types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind)


def _values(column: "pa.Array") -> list[Any]:
    """Converts a column to Python values; None for a value without one, such as invalid UTF-8 or the year 300,000."""
    import pyarrow as pa

    # Arrow needs pandas to convert nanoseconds, and a database of time zones to convert zoned timestamps.
    if pa.types.is_timestamp(column.type):
        zone = "+00:00" if column.type.tz else ""
        moments = _values_or_none(column.cast(pa.timestamp("us", "UTC" if zone else None), safe=False).view(pa.int64()))
        return [_iso(moment, zone) for moment in moments]
    if pa.types.is_time64(column.type):
        column = column.cast(pa.time64("us"), safe=False)
    return _values_or_none(column)


def _values_or_none(column: "pa.Array") -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value_or_none(scalar) for scalar in column]


def _value_or_none(scalar: "pa.Scalar") -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return None


def _iso(microseconds: int | None, zone: str) -> str | None:
    import datetime

    if microseconds is None:
        return None
    try:
        return (datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=microseconds)).isoformat() + zone
    except OverflowError:
        return None
