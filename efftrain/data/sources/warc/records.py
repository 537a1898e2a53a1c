"""Reads the records of a web archive and reports the damaged parts between them.

A record is returned only if it is whole: its block ends where its Content-Length says, and is followed by the next
record, the end of its compressed member or the end of the file. Otherwise, reading continues at the next record header,
and the skipped part is reported with its number of bytes.
"""

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from efftrain.data.sources.warc.members import Damage, Event, Gzip, MemberEnd, Zstd, packing_of, unpack

MAX_HEADER = 1 << 16

_VERSION = re.compile(rb"WARC/[01]\.\d{1,2}[ \t]*\r?\n")
_BLANK_LINE = re.compile(rb"\n\r?\n")
_NEEDED = re.compile(rb"\n(WARC-Type|Content-Length)[ \t]*:", re.IGNORECASE)
_LINE_ENDS = re.compile(rb"[\r\n]*")
_FOLD = re.compile(r"\r?\n[ \t]+")
_OVERHEAD = 64  # bytes that compression adds to incompressible data
_TAIL = 16  # bytes after a block that must show its end: two line ends and "WARC/", with some margin


@dataclass(frozen=True)
class Record:
    """A whole record.

    Attributes:
      place: position in the uncompressed file at which the record begins.
      fields: the header fields, by names in lower case.
      block: the bytes after the header; None if they exceed the limit of the reader.
    """

    place: int
    fields: dict[str, str]
    block: bytes | None


@dataclass(frozen=True)
class Lost:
    """A part of an archive without a whole record.

    Attributes:
      place: position in the uncompressed file at which the part begins.
      n_bytes: number of uncompressed bytes that belong to no record, plus compressed bytes that could not be
        decompressed.
      reason: a sentence without a final full stop.
      url: the URL of the lost record; empty if it is not known.
      rest: the number of lost records is unknown, because nothing could be read up to the end of the file, or because
        the damaged member contains more than this record.
    """

    place: int
    n_bytes: int
    reason: str
    url: str = ""
    rest: bool = False


def records(path: Path, max_bytes: int) -> Iterator[Record | Lost]:
    """Yields the records of a file in order, and a ``Lost`` for each damaged part between them.

    Args:
      path: a plain, gzip or Zstandard file, with one member per record, one member for all records, or members that
        are divided anywhere.
      max_bytes: number of bytes of the largest block that is held in memory; the ``block`` of a larger record is None.

    Raises OSError if the file itself cannot be read.
    """
    with path.open("rb") as file:
        yield from _Reader(file, packing_of(path, file), max_bytes).records()


def target(fields: dict[str, str]) -> str:
    """Returns the URL of a record, or an empty string; removes the angle brackets that some writers add."""
    return fields.get("warc-target-uri", "").removeprefix("<").removesuffix(">").replace(" ", "%20")


def header_fields(header: bytes) -> dict[str, str]:
    """Parses the fields of a WARC or HTTP header, by names in lower case; of several fields of a name, the first."""
    try:
        text = header.decode()
    except UnicodeDecodeError:
        text = header.decode("latin-1")
    fields: dict[str, str] = {}
    for line in _FOLD.sub(" ", text).split("\n"):
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip().lower(), value.strip())
    return fields


@dataclass(frozen=True)
class _Header:
    fields: dict[str, str]
    size: int  # bytes of the header itself
    length: int  # bytes of the block, as the header declares


@dataclass
class _Loss:
    """A ``Lost`` whose end has not been found yet."""

    place: int
    reason: str
    url: str = ""
    missing: int = 0  # bytes of the block that could not be read
    n_bytes: int = 0
    damaged: bool = False
    within_record: bool = False  # the damage is no longer than the missing part of the record
    among_others: bool = False  # whole records were read from the damaged member

    def add(self, damage: Damage, among_others: bool) -> None:
        self.n_bytes += damage.n_bytes
        self.reason = damage.reason
        self.damaged = True
        self.within_record = not damage.cut and damage.n_bytes <= self.missing + _OVERHEAD
        self.among_others = among_others and not damage.cut
        if self.among_others:
            self.reason += ", and records that were read from it may be altered"

    def lost(self, rest: bool = False) -> Lost:
        return Lost(self.place, self.n_bytes, self.reason, self.url, rest or self.among_others)


class _Stop(Enum):
    BOUNDARY = "a compressed member begins here, with a record"
    END = "the end of the file"


class _Reader:
    """Reads records from a buffer of decompressed bytes that ends at a stop, a position at which every record ends."""

    def __init__(self, file: BinaryIO, packing: Gzip | Zstd | None, max_bytes: int):
        self._file, self._packing, self._max_bytes = file, packing, max_bytes
        self._end = file.seek(0, 2) if packing is None else None  # size of the uncompressed file, once it is known
        self._members = deque([(0, 0)])  # (uncompressed, compressed) positions of members, from the current one on
        self._begin(0, 0)

    def _begin(self, at: int, packed: int) -> None:
        self._events: Iterator[Event] = unpack(self._file, self._packing, packed)
        self._held: Event | None = None  # an event after the stop
        self._data, self._at = bytearray(), at
        self._stop: _Stop | Damage | None = None

    def records(self) -> Iterator[Record | Lost]:
        loss: _Loss | None = None
        newest = -1  # position of the last whole record
        while True:
            line_ends = self._drop_line_ends()
            if not self._data and self._stop is _Stop.END:
                break
            if not self._data:
                member = self._members[-1][0]  # position of the latest member
                if loss and (loss.damaged or member == self._at):
                    yield loss.lost()
                    loss = None
                if isinstance(self._stop, Damage):
                    loss = loss or _Loss(self._at, "")
                    loss.add(self._stop, newest >= member)
                    self._at += self._stop.n_bytes  # so that no two items of a file have the same position
                    self._members.append((self._at, self._stop.packed))
                self._stop = None
            elif isinstance(header := self._header(0), str):
                loss = loss or _Loss(self._at, header)
                loss.n_bytes += self._drop_to_header(1)
            else:
                if loss:
                    yield loss.lost()
                    loss = None
                item = self._record(header)
                if isinstance(item, Record):
                    newest = item.place
                    yield item
                else:
                    loss = item
                    loss.n_bytes += self._drop_to_header(header.size)
        if loss:
            known = newest >= 0 and self._packing is not None and (loss.within_record or not loss.damaged)
            yield loss.lost(rest=not known)
        elif newest < 0:
            yield Lost(0, self._at, "the file holds no record", rest=True)
        elif self._packing is None and line_ends < 2:
            yield Lost(self._at, 0, "the file ends without the two line ends that close a record", rest=True)

    def _record(self, header: _Header) -> Record | _Loss:
        """Returns the record at the beginning of the data, which is consumed only if the record is whole."""
        place, size = self._at, header.size + header.length
        reason = f"no record follows where its Content-Length of {header.length:,} ends"
        loss = _Loss(place, reason, target(header.fields))
        if self._end is not None and place + size > self._end:
            loss.reason = f"its Content-Length of {header.length:,} reaches past the end of the file"
        elif header.length <= self._max_bytes:
            self._fill(size + _TAIL)
            if self._ends_at(size):
                block = bytes(memoryview(self._data)[header.size : size])
                self._drop(size)
                return Record(place, header.fields, block)
            loss.missing = max(size - len(self._data), 0)
        else:
            member = self._members[0] if self._packing else (place, place)
            loss.missing = self._pass_over(size)
            if not loss.missing and self._ends_at(0):
                return Record(place, header.fields, None)
            self._members = deque([member])
            self._begin(*member)
            self._pass_over(place - self._at)
            self._fill(header.size)
        if loss.missing:
            loss.reason = f"its Content-Length of {header.length:,} reaches past the end of its compressed member"
        return loss

    def _ends_at(self, n: int) -> bool:
        """Returns whether a record may end after ``n`` bytes: with its member, before a record or with its line ends.

        After the two line ends of a whole record, bytes that are not a record may follow.
        """
        self._fill(n + _TAIL)
        if len(self._data) < n:
            return False
        tail = bytes(self._data[n : n + _TAIL])
        rest = tail.lstrip(b"\r\n")
        last = n + len(tail) - len(rest)
        if any(n <= place - self._at <= last for place, _ in self._members):
            return True
        if rest and b"WARC/".startswith(rest[:5]):
            return True
        self._fill(n + MAX_HEADER)
        if isinstance(self._stop, Damage):  # the bytes before it may be damaged too
            return False
        return not rest or tail.startswith(b"\r\n\r\n")

    def _header(self, start: int) -> _Header | str:
        """Returns the header that begins in the data at ``start``, or the reason why it is invalid."""
        self._fill(start + MAX_HEADER)
        version = _VERSION.match(self._data, start)
        if not version:
            return "no record begins here"
        end = _BLANK_LINE.search(self._data, version.end() - 1, start + MAX_HEADER)
        if not end:
            return "the header of this record does not end"
        header = bytes(self._data[version.end() - 1 : end.start()])
        if sorted(map(bytes.lower, _NEEDED.findall(header))) != [b"content-length", b"warc-type"]:
            return "the header of this record does not have exactly one WARC-Type and one Content-Length"
        if _VERSION.search(header):
            return "the header of this record runs into the next record"
        fields = header_fields(header)
        length = fields["content-length"]
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            return f"the Content-Length of this record is {length!r}, not a number of bytes"
        return _Header(fields, end.end() - start, int(length))

    def _drop_to_header(self, start: int) -> int:
        """Drops the data up to the next header after ``start``, or up to the stop; returns the number of bytes."""
        n_bytes = 0
        while True:
            version = _VERSION.search(self._data, start)
            if version and isinstance(self._header(version.start()), str):
                start = version.start() + 1
            elif version or self._stop:
                start = version.start() if version else len(self._data)
                self._drop(start)
                return n_bytes + start
            else:
                dropped = max(start, len(self._data) - _TAIL)  # keeps a version line that is still incomplete
                self._drop(dropped)
                start, n_bytes = 0, n_bytes + dropped
                self._fill(len(self._data) + MAX_HEADER)

    def _pass_over(self, n_bytes: int) -> int:
        """Drops bytes without holding them; returns how many of them are missing because the stop came first."""
        while n_bytes:
            self._fill(1)
            if not self._data:
                break
            dropped = min(n_bytes, len(self._data))
            self._drop(dropped)
            n_bytes -= dropped
        return n_bytes

    def _drop_line_ends(self) -> int:
        self._fill(MAX_HEADER)
        found = _LINE_ENDS.match(self._data)
        blank = found[0] if found else b""
        self._drop(len(blank))
        return blank.count(b"\n")

    def _drop(self, n_bytes: int) -> None:
        del self._data[:n_bytes]
        self._at += n_bytes
        while len(self._members) > 1 and self._members[1][0] <= self._at:
            self._members.popleft()

    def _fill(self, n_bytes: int) -> None:
        """Reads until ``n_bytes`` of data are held, or until the stop."""
        while len(self._data) < n_bytes and self._stop is None:
            event = self._held or next(self._events, _Stop.END)
            self._held = None
            end = self._at + len(self._data)
            if isinstance(event, MemberEnd):
                self._members.append((end, event.packed))
            elif not isinstance(event, bytes):
                self._stop = event
            elif self._data and self._members[-1][0] == end and event.startswith(b"WARC/"):
                self._held, self._stop = event, _Stop.BOUNDARY
            else:
                self._data += event
            if event is _Stop.END:
                self._end = end
