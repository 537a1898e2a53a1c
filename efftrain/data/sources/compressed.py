"""Reads bytes and lines of plain and compressed files, in bounded memory. A truncated file raises an error.

The compression format is detected from the first bytes of a file, and from its suffix only if the bytes are
inconclusive: a ``.jsonl`` file that is gzip is read like a ``.jsonl.gz``. A zstd frame may require a window of up to
2 GB, which is allocated in memory.
"""

import bz2
import codecs
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 8192  # bytes; small, because a chunk of zstd may decompress to many thousand times its size
_HEAD = 16  # bytes from which the format is detected
_UNPACKED = 1 << 16  # limit of the bytes that are decompressed at once, for libraries that accept a limit
_ZSTD_WINDOW = 1 << 31  # bytes, the largest window of the format


class Damaged(OSError):
    """Raised if a file cannot be read to its end.

    Attributes:
      n_bytes: number of bytes of the file on disk after the position where reading failed.
    """

    def __init__(self, reason: object, n_bytes: int):
        super().__init__(str(reason))
        self.n_bytes = n_bytes


@dataclass(frozen=True)
class _Packing:
    """A compression format.

    Attributes:
      magic: matches the first bytes of a file.
      member: returns a decompressor for one member, frame or stream; a file may contain several of them.
      bounded: whether the decompressor accepts a limit of the bytes to decompress.
      padding: bytes that are allowed between and after members.
    """

    magic: re.Pattern[bytes]
    member: Callable[[], Any]
    bounded: bool = True
    padding: bytes = b""


def _zstd_member() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()


_PACKINGS = {
    ".gz": _Packing(re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(wbits=31), padding=b"\0"),
    ".zst": _Packing(re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd_member, bounded=False),
    ".bz2": _Packing(re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
    ".xz": _Packing(re.compile(rb"\xfd7zXZ\0"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=b"\0"),
}

PACKED = tuple(_PACKINGS)
"""The suffixes of compressed files, in lower case."""

_MARKS = {  # byte order mark -> encoding; UTF-32 comes first because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def is_compressed(path: Path) -> bool:
    """Returns whether a file is compressed; False if it cannot be opened."""
    try:
        return _packing(path, _head(path)) is not None
    except OSError:
        return False


def is_plain_utf8(path: Path) -> bool:
    """Returns whether ``open_utf8`` gives the bytes of the file unchanged, so that reading can begin anywhere in it."""
    try:
        head = _head(path)
    except OSError:
        return False
    return _packing(path, head) is None and _encoding(head) is None


def open_bytes(path: Path) -> io.BufferedReader:
    """Opens a file as its decompressed bytes. Reading raises ``Damaged`` if a compressed file is cut or damaged."""
    file = path.open("rb")
    try:
        packing = _packing(path, file.peek(_HEAD))
    except BaseException:
        file.close()
        raise
    return file if packing is None else io.BufferedReader(_Chunks(_unpack(file, packing), file), _UNPACKED)


def open_utf8(path: Path) -> io.BufferedReader:
    """Opens a text file as its decompressed bytes; UTF-16 and UTF-32 with a byte order mark are converted to UTF-8.

    Reading raises ``Damaged`` as in ``open_bytes``, and if the text is not in the encoding that its mark declares.
    """
    stream = open_bytes(path)
    try:
        encoding = _encoding(stream.peek(4))
    except BaseException:
        stream.close()
        raise
    if encoding is None:
        return stream
    return io.BufferedReader(_Chunks(_transcode(stream, encoding), stream), _UNPACKED)


def reading_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that reading a damaged file, or decompressing a part of one, may raise."""
    import zstandard

    return OSError, EOFError, zlib.error, zstandard.ZstdError


def lines(
    stream: BinaryIO, max_bytes: int, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, int, bytes | None]]:
    """Yields the lines that begin in the bytes [start, stop) of a stream, so that each line belongs to one range.

    Args:
      stream: at its beginning; it must be seekable if ``start`` is not 0.
      max_bytes: number of bytes of the longest line that is held in memory; longer lines are skipped.
      start: first byte of the range.
      stop: first byte after the range; None reads to the end.

    Yields:
      (position, size, line): the byte at which the line begins, its number of bytes, and the line, or None if it is
      too long.
    """
    at = start
    if start:
        stream.seek(start - 1)  # a line begins at ``start`` only if the byte before it is a newline
        at = start - 1 + _pass(stream, max_bytes, stop)
    while stop is None or at < stop:
        line = stream.readline(max_bytes + 1)
        if not line:
            return
        size = len(line)
        if size > max_bytes and not line.endswith(b"\n"):
            size, line = size + _pass(stream, max_bytes), None
        yield at, size, line
        at += size


def _pass(stream: BinaryIO, max_bytes: int, stop: int | None = None) -> int:
    """Reads to the end of the line, or until ``stop`` is passed; returns the number of bytes."""
    n_bytes = 0
    while line := stream.readline(max_bytes):
        n_bytes += len(line)
        if line.endswith(b"\n") or (stop is not None and stream.tell() >= stop):
            break
    return n_bytes


def _head(path: Path) -> bytes:
    number = os.open(path, os.O_RDONLY)  # faster than path.open, which matters in folders with many files
    try:
        return os.read(number, _HEAD)
    finally:
        os.close(number)


def _packing(path: Path, head: bytes) -> _Packing | None:
    for packing in _PACKINGS.values():
        if packing.magic.match(head):
            return packing
    return _PACKINGS.get(path.suffix.lower())


def _encoding(head: bytes) -> str | None:
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    return None


def _unpack(file: BinaryIO, packing: _Packing) -> Iterator[bytes]:
    """Yields the decompressed chunks of a file. The libraries' own readers end silently at a damaged second member."""
    import zstandard

    try:
        yield from _members(file, packing)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise Damaged(error, os.fstat(file.fileno()).st_size - file.tell()) from error


def _members(file: BinaryIO, packing: _Packing) -> Iterator[bytes]:
    packed = file.read(_CHUNK)
    if not packed:
        raise EOFError("the compressed file is empty")
    bound = (_UNPACKED,) if packing.bounded else ()
    while packed:
        member = packing.member()
        while not member.eof:
            if chunk := member.decompress(packed, *bound):
                yield chunk
            packed = getattr(member, "unconsumed_tail", b"")  # only zlib returns it; the others buffer it themselves
            if not member.eof and not packed and getattr(member, "needs_input", True):
                packed = file.read(_CHUNK)
                if not packed:
                    raise EOFError("the file is truncated: it ends inside its compressed data")
        packed = member.unused_data or file.read(_CHUNK)
        while packed and not (packed := packed.lstrip(packing.padding) if packing.padding else packed):
            packed = file.read(_CHUNK)


def _transcode(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        while chunk := stream.read(_CHUNK):
            yield decoder.decode(chunk).encode()
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise Damaged(error, 0) from error


class _Chunks(io.RawIOBase):
    """A stream over chunks of bytes. Closing it closes the file that the chunks are read from."""

    def __init__(self, chunks: Iterator[bytes], file: io.BufferedReader):
        self._chunks, self._file, self._left = chunks, file, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._left = memoryview(chunk)
        n = min(len(buffer), len(self._left))
        buffer[:n] = self._left[:n]
        self._left = self._left[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
