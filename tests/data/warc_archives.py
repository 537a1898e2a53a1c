"""Small web archives, written byte by byte so that a test knows where each record lies and can damage it."""

import gzip
import random
from collections.abc import Iterator
from pathlib import Path

import zstandard

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources.warc.source import Warc

KINDS = {
    "warc": lambda record: record,
    "warc.gz": lambda record: gzip.compress(record, mtime=0),
    "warc.zst": lambda record: zstandard.ZstdCompressor(write_checksum=True).compress(record),
}


def record(url: str | None, block: bytes, kind: str = "conversion", length: int | None = None, **fields: str) -> bytes:
    """A record with the line ends that close it; ``length`` is what its Content-Length says instead of the truth."""
    lines = ["WARC/1.0", f"WARC-Type: {kind}", *([f"WARC-Target-URI: {url}"] if url is not None else [])]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    lines += [f"Content-Length: {len(block) if length is None else length}", "", ""]
    return "\r\n".join(lines).encode() + block + b"\r\n\r\n"


def page(body: bytes, *headers: str, url: str | None = "https://a.example/", **fields: str) -> bytes:
    """A response record with a page."""
    lines = ["HTTP/1.1 200 OK", *(headers or ["Content-Type: text/html"]), "", ""]
    return record(url, "\r\n".join(lines).encode("latin-1") + body, "response", **fields)


def texts(n: int, seed: int = 0) -> list[str]:
    """Texts that hardly compress, of very different lengths, with characters of several bytes."""
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz äöü\n", k=rng.choice((5, 300, 3000)))) for _ in range(n)]


def url(n: int) -> str:
    return f"https://a.example/{n}"


def places(parts: list[bytes]) -> Iterator[tuple[int, int]]:
    """Where each part begins and ends when all are joined."""
    end = 0
    for part in parts:
        start, end = end, end + len(part)
        yield start, end


def read(path: Path) -> list[Document | Skipped]:
    source = Warc(path=path)
    return [item for piece in source.pieces() for item in source.documents(piece)]


def read_parts(folder: Path, kind: str, parts: list[bytes]) -> list[Document | Skipped]:
    """What is read from a file that consists of these bytes."""
    path = folder / f"x.{kind}"
    path.write_bytes(b"".join(parts))
    return read(path)
