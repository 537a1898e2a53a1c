"""Decompresses a web archive member by member, and continues after members that cannot be decompressed.

A crawler compresses each record as a gzip member or Zstandard frame of its own, so that a reader can begin at any of
them. This also limits the loss from damage: after a broken member, the next one is searched for in the compressed
bytes.
"""

import zlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

_TRIAL_BYTES = 1 << 16  # compressed bytes that must decompress for a position to count as the beginning of a member
_SEARCH_BYTES = 1 << 20
_MAX_DICTIONARY = 64 << 20


@dataclass(frozen=True)
class MemberEnd:
    """Event: a member ended regularly, with a valid checksum.

    Attributes:
      packed: position in the compressed file at which the next member begins.
    """

    packed: int


@dataclass(frozen=True)
class Damage:
    """Event: compressed bytes that could not be decompressed.

    Attributes:
      packed: position in the compressed file at which reading continues: the next member or, without one, the end of
        the file.
      n_bytes: number of compressed bytes from the first that could not be decompressed up to ``packed``; at least 1
        unless ``cut`` is set.
      reason: a sentence without a final full stop.
      cut: the file ends inside a member.
    """

    packed: int
    n_bytes: int
    reason: str
    cut: bool = False


Event = bytes | MemberEnd | Damage


class Decompressor(Protocol):
    """Decompresses one member; has the interface of ``zlib.decompressobj``."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


class Gzip:
    """Gzip members (RFC 1952). The checksum and length of a member are verified at its end."""

    name = "gzip member"
    magic = b"\x1f\x8b\x08"
    chunk = 1 << 13  # small, because a byte can decompress to 1,032 bytes

    def decoder(self, head: bytes) -> Decompressor:
        return zlib.decompressobj(31)

    def errors(self) -> tuple[type[Exception], ...]:
        return zlib.error, EOFError


class Zstd:
    """Zstandard frames (RFC 8878). A skippable frame 0x184D2A5D contains the dictionary of the frames after it.

    Source: Zstandard Compression for WARC Files 1.0, International Internet Preservation Consortium.
    """

    name = "Zstandard frame"
    magic = b"\x28\xb5\x2f\xfd"
    chunk = 1 << 9  # small, because 4 bytes can decompress to 128 kB

    def __init__(self):
        import zstandard

        self._decompressor = zstandard.ZstdDecompressor()

    def decoder(self, head: bytes) -> Decompressor:
        if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
            return _SkippableFrame(self._use_dictionary if head[0] == 0x5D else None)
        return self._decompressor.decompressobj()

    def errors(self) -> tuple[type[Exception], ...]:
        import zstandard

        return zstandard.ZstdError, EOFError

    def _use_dictionary(self, content: bytes) -> None:
        import zstandard

        if content.startswith(self.magic):  # the dictionary itself may be compressed
            content = zstandard.ZstdDecompressor().stream_reader(content).read(_MAX_DICTIONARY)
        self._decompressor = zstandard.ZstdDecompressor(dict_data=zstandard.ZstdCompressionDict(content))


class _SkippableFrame:
    """Decompressor of a skippable frame: returns no bytes, and passes the content of the frame to ``use``."""

    def __init__(self, use: Any):
        self.eof, self.unused_data = False, b""
        self._use, self._head, self._content, self._left = use, b"", bytearray(), -1

    def decompress(self, data: bytes) -> bytes:
        if self._left < 0:
            self._head += data
            if len(self._head) < 8:
                return b""
            self._left, data = int.from_bytes(self._head[4:8], "little"), self._head[8:]
            if self._use and self._left > _MAX_DICTIONARY:
                raise EOFError(f"a dictionary of {self._left:,} bytes is too large")
        taken = data[: self._left]
        self._left -= len(taken)
        if self._use:
            self._content += taken
        if not self._left:
            self.eof, self.unused_data = True, data[len(taken) :]
            if self._use:
                self._use(bytes(self._content))
        return b""


def packing_of(path: Path, file: BinaryIO) -> Gzip | Zstd | None:
    """Detects the compression of a file from its first bytes or else its suffix; None if it is not compressed."""
    head = file.read(5)
    if head.startswith(Gzip.magic):
        return Gzip()
    if head.startswith(Zstd.magic) or head[1:4] == b"\x2a\x4d\x18":
        return Zstd()
    if head == b"WARC/":
        return None
    return {".gz": Gzip(), ".zst": Zstd()}.get(path.suffix)


def unpack(file: BinaryIO, packing: Gzip | Zstd | None, start: int = 0) -> Iterator[Event]:
    """Yields the decompressed bytes of a file in chunks of bounded size, with the ends of members and the damage.

    The first chunk of a member has at least 5 bytes, unless the member is shorter. Zeros between and after members
    are skipped as padding. Raises OSError if the file itself cannot be read.

    Args:
      file: the compressed file.
      packing: its compression; None yields the bytes as they are.
      start: position of the first member to read.
    """
    file.seek(start)
    if packing is None:
        while data := file.read(1 << 16):
            yield data
        return
    packed = b""
    while True:
        packed = packed.lstrip(b"\0")
        while len(packed) < packing.chunk and (more := file.read(packing.chunk - len(packed))):
            packed = (packed + more).lstrip(b"\0")
        if not packed:
            return
        packed = yield from _member(file, packing, file.tell() - len(packed), packed)


def _member(file: BinaryIO, packing: Gzip | Zstd, at: int, packed: bytes) -> Generator[Event, None, bytes]:
    """Yields one member, or the damage in its place; returns the compressed bytes that were read after it.

    Args:
      at: position in the file at which the member begins.
      packed: the first bytes of the member; the rest is read from the file.
    """
    first, n_fed, n_unpacked = len(packed), 0, 0
    try:
        decoder = packing.decoder(packed)
        while True:
            data = decoder.decompress(packed)
            n_fed += len(packed)
            n_unpacked += len(data)
            if data:
                yield data
            if decoder.eof:
                yield MemberEnd(at + n_fed - len(decoder.unused_data))
                return decoder.unused_data
            packed = file.read(packing.chunk)
            if not packed:
                raise EOFError(f"the file ends inside the {packing.name} that begins at its byte {at:,}")
    except packing.errors() as error:
        cut, reason = not packed, str(error)
    bad = at + n_fed
    if not cut:
        reason = f"the {packing.name} at byte {at:,} of the file cannot be unpacked: {reason}"
        data, bad = _salvaged(file, packing, at, first, n_fed)
        n_unpacked += len(data)
        if data:
            yield data
    bad = bad if n_unpacked else at
    following = _next_member(file, packing, at + 1)
    end = file.seek(0, 2) if following is None else following
    if cut and following is None:
        yield Damage(end, end - bad, reason, cut=True)
    else:
        yield Damage(end, max(end - bad, 1), reason)
    file.seek(end)
    return b""


def _salvaged(file: BinaryIO, packing: Gzip | Zstd, at: int, first: int, n_fed: int) -> tuple[bytes, int]:
    """Returns what a failed call decompressed before its error, and the position of the erroneous byte.

    The decoders discard the output of a call that fails, so the member is decompressed again, its last chunk byte by
    byte.

    Args:
      at: position in the file at which the member begins.
      first: number of bytes of its first chunk.
      n_fed: number of bytes of all chunks before the one that failed.
    """
    file.seek(at)
    decoder = packing.decoder(file.read(5))
    file.seek(at)
    place, size = at, first
    while place < at + n_fed:
        decoder.decompress(file.read(size))
        place, size = place + size, packing.chunk
    unpacked = bytearray()
    try:
        for byte in file.read(size):
            unpacked += decoder.decompress(bytes((byte,)))
            place += 1
    except packing.errors():
        pass
    return bytes(unpacked), place


def _next_member(file: BinaryIO, packing: Gzip | Zstd, start: int) -> int | None:
    """Returns the first position from ``start`` on at which the bytes can be decompressed as a member."""
    at, window = start, b""
    file.seek(at)
    while data := file.read(_SEARCH_BYTES):
        window += data
        found = window.find(packing.magic)
        while found >= 0:
            if _can_be_unpacked(file, packing, at + found):
                return at + found
            found = window.find(packing.magic, found + 1)
        keep = len(packing.magic) - 1
        at, window = at + len(window) - keep, window[-keep:]
        file.seek(at + keep)
    return None


def _can_be_unpacked(file: BinaryIO, packing: Gzip | Zstd, at: int) -> bool:
    file.seek(at)
    decoder = packing.decoder(packing.magic)
    try:
        for _ in range(0, _TRIAL_BYTES, packing.chunk):
            decoder.decompress(file.read(packing.chunk))
            if decoder.eof:
                break
    except packing.errors():
        return False
    return True
