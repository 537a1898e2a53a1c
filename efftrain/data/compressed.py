"""Lines of plain, gzip and zstd files, in bounded memory, where a truncated file is an error and not a short one."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 8192  # small, because a chunk may unpack to many thousand times its size


def is_compressed(path: Path) -> bool:
    return path.suffix in (".gz", ".zst")


def open_bytes(path: Path) -> BinaryIO:
    """Opens by suffix: ``.gz``, ``.zst``, anything else as it is."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdReader(path))
    return path.open("rb")


def reading_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged file may raise."""
    import zstandard

    return OSError, EOFError, zlib.error, zstandard.ZstdError


def lines(stream: BinaryIO, most: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """The lines that begin in the bytes [start, stop) of a stream, so that neighbouring ranges share the lines out.

    Args:
      stream: at its beginning; it must be seekable where ``start`` is not 0.
      most: bytes of the longest line that is held in memory; a longer one is passed over.

    Yields:
      Where the line begins and the line, or None in the place of one that is too long.
    """
    at = start
    if start:
        stream.seek(start - 1)  # the byte before tells whether a line begins at ``start``
        at = start - 1 + _pass(stream, most, stop)
    while stop is None or at < stop:
        line = stream.readline(most + 1)
        if not line:
            return
        size = len(line)
        if size > most and not line.endswith(b"\n"):
            size, line = size + _pass(stream, most), None
        yield at, line
        at += size


def _pass(stream: BinaryIO, most: int, stop: int | None = None) -> int:
    """Reads to the end of the line, or over ``stop``; returns the number of bytes."""
    n_bytes = 0
    while line := stream.readline(most):
        n_bytes += len(line)
        if line.endswith(b"\n") or (stop is not None and stream.tell() >= stop):
            break
    return n_bytes


class _ZstdReader(io.RawIOBase):
    """All frames of a file. The library's own reader stops after the first one, and is silent about a cut frame."""

    def __init__(self, path: Path):
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._unpacked:
            self._packed = self._packed or self._file.read(_CHUNK)
            if not self._packed and self._frame:
                raise EOFError("the file ends inside a compressed frame")
            if not self._packed:
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        n = min(len(buffer), len(self._unpacked))
        buffer[:n] = self._unpacked[:n]
        self._unpacked = self._unpacked[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()
