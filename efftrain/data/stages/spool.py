"""Serialises documents as records between stages, and sorts records in bounded memory."""

import contextlib
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

from efftrain.data.documents import Document

_LENGTHS = struct.Struct("<IIIQ")  # id, source, meta, text
_KEYED = struct.Struct("<QQ")  # key, payload length
_BITS = 6  # 64 files are open at a time, far below the limit of any system


def stable_hash(text: str, salt: str) -> int:
    """Returns a 64-bit hash that is the same on every machine and in every process."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8, key=salt.encode()[:64])
    return int.from_bytes(digest.digest(), "little")


def pack_document(document: Document, utf8: bytes) -> bytes:
    """Serialises a document as a record; ``utf8`` is the encoded text, which replaces the text of the document."""
    meta = json.dumps(document.meta, sort_keys=True)
    parts = [
        document.id.encode(errors="replace"),
        document.source.encode(errors="replace"),
        meta.encode(),
        utf8,
    ]
    return _LENGTHS.pack(*map(len, parts)) + b"".join(parts)


def replace_text(record: bytes, utf8: bytes) -> bytes:
    """Returns the record with another text."""
    n_id, n_source, n_meta, _ = _LENGTHS.unpack_from(record)
    end = _LENGTHS.size + n_id + n_source + n_meta
    return _LENGTHS.pack(n_id, n_source, n_meta, len(utf8)) + record[_LENGTHS.size : end] + utf8


def unpack_record(record: bytes) -> tuple[str, str, str, bytes]:
    """Returns (id, source, meta as JSON, text in UTF-8) of a record."""
    n_id, n_source, n_meta, _ = _LENGTHS.unpack_from(record)
    a = _LENGTHS.size
    b, c = a + n_id, a + n_id + n_source
    return record[a:b].decode(), record[b:c].decode(), record[c : c + n_meta].decode(), record[c + n_meta :]


class ExternalSort:
    """Sorts payloads by 64-bit keys on disk, in bounded memory. The sort is stable.

    Payloads are distributed to files by the top bits of their keys. A file that fits into memory is sorted there; a
    larger one is distributed again by the next bits. Use it as a context manager, which closes all files.
    """

    def __init__(self, folder: Path, *, memory: int = 32 << 20, depth: int = 0):
        folder.mkdir(parents=True)
        self._folder, self._memory, self._depth = folder, memory, depth
        self._paths = [folder / f"{number:02d}" for number in range(1 << _BITS)]
        self._files = [path.open("wb") for path in self._paths]

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):  # flushing the buffer fails on a full disk
                file.close()

    def add(self, key: int, payload: bytes) -> None:
        place = (key >> (64 - _BITS * (self._depth + 1))) & ((1 << _BITS) - 1)
        self._files[place].write(_KEYED.pack(key, len(payload)) + payload)

    def __iter__(self) -> Iterator[bytes]:
        """Yields the payloads in order and deletes each file after it is read. It can be iterated only once."""
        for file in self._files:
            file.close()
        for path in self._paths:
            deepest = _BITS * (self._depth + 2) > 64
            if path.stat().st_size <= self._memory or deepest:
                yield from (payload for _, payload in sorted(_keyed(path), key=lambda pair: pair[0]))
            else:
                with ExternalSort(path.with_suffix(".d"), memory=self._memory, depth=self._depth + 1) as finer:
                    for key, payload in _keyed(path):
                        finer.add(key, payload)
                    yield from finer
            path.unlink()
        self._folder.rmdir()


def _keyed(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        while head := stream.read(_KEYED.size):
            key, length = _KEYED.unpack(head)
            yield key, stream.read(length)
