"""Reads documents from JSON: one object per line, or the objects of an array."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import PathSource, Piece, byte_ranges, file_size, named_files
from efftrain.data.sources.compressed import PACKED, is_plain_utf8, lines, open_utf8
from efftrain.data.sources.metadata import as_name, metadata

_CHUNK = 1 << 16
_SHOWN = 12  # number of field names in an error message
_SPANS_LINES = re.compile(rb"(\xef\xbb\xbf)?\s*(\[|\{[ \t]*\r?\n)")  # an array, or an object over several lines
_STRUCTURE = re.compile(rb'\\.|["{}\[\]]', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class JsonLines(PathSource):
    """Reads documents from JSON Lines: a ``.jsonl``, ``.ndjson`` or ``.json`` file, or all such files below a folder.

    Each may be compressed as ``.gz``, ``.zst``, ``.bz2`` or ``.xz``. A file that is one JSON array of objects, or whose
    objects span several lines, is read as well, in one piece.

    By default, the id of a document is ``file@byte``, the position of its object in the uncompressed file. Unlike a
    line number, it is known wherever reading starts (``tail -c +$((byte + 1)) file | head -1`` shows the object). All
    other scalar fields of the object become the ``meta`` of the document, see ``metadata.metadata``.

    A field is named by its key, or by a path with dots (``data.text``) if it is in a nested object.

    Attributes:
      text_field: the field that contains the text.
      id_field: the field that contains the id. None, or a missing or null value: the id is ``file@byte``.
      group_field: the field that names the group of documents that must stay in one split. None, or a missing or
        null value: the document is a group of its own.
    """

    text_field: str = "text"
    id_field: str | None = None
    group_field: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        kinds = (".jsonl", ".ndjson", ".json")
        yield from named_files(self.path, tuple(kind + packed for kind in kinds for packed in ("", *PACKED)))

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Returns ranges of bytes. A line belongs to the range in which it begins."""
        if size <= sources.RANGE_BYTES or not is_plain_utf8(path):
            return [(0, None)]
        try:
            with open_utf8(path) as stream:
                return [(0, None)] if _spans_lines(stream) else byte_ranges(size)
        except OSError:  # reported when the documents are read
            return [(0, None)]

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            place = piece.start
            try:
                with open_utf8(path) as stream:
                    if not piece.start and _spans_lines(stream):
                        records = objects(stream, sources.MAX_BYTES)
                    else:
                        records = lines(stream, sources.MAX_BYTES, piece.start, piece.stop)
                    for place, size, record in records:
                        if record is None or not record.isspace():
                            yield self._document(f"{name}@{place}", size, record)
            except (OSError, EOFError) as error:
                yield self.lost(f"{name}@{place}", error, max(file_size(path) - place, 0))

    def _document(self, place: str, size: int, record: bytes | None) -> Document | Skipped:
        if record is None:
            most = f"more than {sources.MAX_BYTES:,} bytes"
            return Skipped(place, self.source, "too_large", f"the line or object has {most}", size)
        try:
            row = json.loads(record)
            if not isinstance(row, dict):
                raise TypeError(f"expected an object with a field {self.text_field!r}, found {_kind(row)}")
            text = _field(row, self.text_field)
            if not isinstance(text, str):
                raise TypeError(self._no_text(row, text))
        except UnicodeDecodeError as error:
            return Skipped(place, self.source, "undecodable", str(error), size)
        except json.JSONDecodeError as error:
            detail = f"it is not JSON ({error.msg}, character {error.pos}); it begins with {record[:60].strip()!r}"
            return Skipped(place, self.source, "bad_record", detail, size)
        except (ValueError, TypeError, RecursionError) as error:
            return Skipped(place, self.source, "bad_record", str(error), size)
        id = as_name(_field(row, self.id_field)) if self.id_field else None
        meta = {}
        if len(row) > 1:
            group = _field(row, self.group_field) if self.group_field else None
            meta = metadata(row.items(), (self.text_field, self.id_field, self.group_field), group)
        return Document(id or place, text, self.source, meta)

    def _no_text(self, row: dict[str, Any], found: Any) -> str:
        names = ", ".join(list(row)[:_SHOWN]) + (", ..." if len(row) > _SHOWN else "") or "none"
        missing = found is None and self.text_field not in row
        what = "there is no field {!r}" if missing else "the field {!r} is " + f"{_kind(found)}, not a string"
        return f"{what.format(self.text_field)}; the fields are: {names}"


def objects(stream: BinaryIO, max_bytes: int) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields the objects of a JSON array or of a sequence of objects, whatever their line breaks.

    Args:
      stream: the JSON text in UTF-8.
      max_bytes: number of bytes of the largest object that is held in memory; larger ones are skipped.

    Yields:
      (position, size, object): the byte at which the object begins, its number of bytes, and the object, or None if it
      is too large. Text between objects that is neither a comma nor white space is yielded like an object.

    Raises:
      EOFError: the stream ends inside an object or an array.
    """
    held, begins, size = bytearray(), 0, 0
    place, depth, in_array, in_string, rest = 0, 0, False, False, b""

    def take(part: bytes) -> None:
        nonlocal size
        size += len(part)
        if size <= max_bytes:
            held.extend(part)
        else:
            held.clear()

    def found() -> Iterator[tuple[int, int, bytes | None]]:
        nonlocal begins, size
        record = bytes(held) if size <= max_bytes else None
        if record is None or record.strip(b" \t\r\n,\xef\xbb\xbf"):
            yield begins, size, record
        begins, size = begins + size, 0
        held.clear()

    while read := stream.read(_CHUNK):
        chunk = rest + read
        n_rest = (len(chunk) - len(chunk.rstrip(b"\\"))) % 2  # keeps a backslash together with the character it escapes
        chunk, rest = chunk[: len(chunk) - n_rest], chunk[len(chunk) - n_rest :]
        done = 0
        for match in _STRUCTURE.finditer(chunk):
            sign, at = match[0], match.start()
            if sign == b'"':
                in_string = not in_string
            elif in_string or len(sign) == 2:
                continue
            elif not depth and sign in (b"[", b"]"):
                in_array = sign == b"["
                take(chunk[done:at])
                yield from found()
                begins, done = place + at + 1, at + 1
            elif sign == b"{":
                if not depth:
                    take(chunk[done:at])
                    yield from found()
                    begins, done = place + at, at
                depth += 1
            elif sign == b"}":
                depth = max(depth - 1, 0)
                if not depth:
                    take(chunk[done : at + 1])
                    yield from found()
                    done = at + 1
        take(chunk[done:])
        place += len(chunk)
    take(rest)
    if depth or in_string or in_array:
        raise EOFError("the file is truncated: it ends inside a JSON " + ("object" if depth or in_string else "array"))
    yield from found()


def _spans_lines(stream: Any) -> bool:
    return _SPANS_LINES.match(stream.peek(_CHUNK)) is not None


def _field(row: dict[str, Any], name: str) -> Any:
    """Returns the value of a field by its key or its path with dots; None if it is missing."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
