"""Lines of plain, gzip and zstd files, in bounded memory, where a truncated file is an error and not a short one."""

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK = 8192  # small, because a chunk may unpack to many thousand times its size


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


def lines(stream: BinaryIO, most: int) -> Iterator[bytes | None]:
    """Lines of at most ``most`` bytes; a longer one is passed over and yields None."""
    while line := stream.readline(most):
        if len(line) < most or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(most)
        yield None


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
