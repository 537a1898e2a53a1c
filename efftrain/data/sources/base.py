"""Defines the interface of a source of documents, and the parts that all sources share.

A source lists its files (for the fingerprint of the inputs), divides them into pieces, and streams the documents of a
piece. Pieces are the unit of work: workers read different pieces in parallel, and an interrupted build resumes at a
piece. They depend only on the files, never on the number of workers.
"""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources.compressed import PACKED, is_compressed
from efftrain.errors import ConfigError, CorpusError

# Larger documents are reported as skipped and never held in memory.
MAX_BYTES = 64 << 20

PIECE_BYTES = 16 << 20  # small files are grouped into pieces of up to this size, about a second of work
PIECE_FILES = 2000
RANGE_BYTES = 32 << 20  # a larger file is read in ranges of about this size

# Files and folders that Spark, Hive and Delta Lake leave beside their data.
_MARKERS = frozenset({"_SUCCESS", "_metadata", "_common_metadata", "_temporary", "_delta_log"})
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one slash, because pathlib collapses two into one


@dataclass(frozen=True)
class Piece:
    """A part of a source that one worker reads without interruption.

    Attributes:
      files: (name, path) of each file, as in ``Source.files``.
      start: first unit of a range, if the piece is a part of one file. The source defines the unit: bytes, row groups,
        record batches or records.
      stop: the first unit after the range; None reads to the end of the file.
    """

    files: tuple[tuple[str, Path], ...]
    start: int = 0
    stop: int | None = None


class Source(Protocol):
    """The interface of a source: a frozen dataclass that describes what to read.

    Nothing is opened before an iteration begins.

    Attributes:
      kind: the kind of its texts: "text" (prose), "code" or "web". It selects the default rules of a corpus.
    """

    kind: ClassVar[str]

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yields (name, path) of each file that is read, always in the same order.

        Raises CorpusError if there is no file.
        """

    def pieces(self) -> Iterator[Piece]:
        """Yields the pieces of the source, in the order of ``files``. Equal files give equal pieces."""

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        """Yields the documents of a piece. Only one document is held in memory at a time."""


class FileSource:
    """Base class of a source of files. A subclass defines ``files`` and ``documents``; the pieces are derived here."""

    kind: ClassVar[str] = "text"

    def files(self) -> Iterator[tuple[str, Path]]:
        raise NotImplementedError

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        raise NotImplementedError

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Returns (start, stop) of each piece of a file of ``size`` bytes. The default is one piece, the whole file."""
        return [(0, None)]

    def pieces(self) -> Iterator[Piece]:
        """Yields pieces of whole files, of up to 16 MB or 2,000 files each.

        A file with several ranges gives a piece per range, and a compressed file is a piece of its own.
        """
        held: list[tuple[str, Path]] = []
        n_bytes = 0
        for name, path in self.files():
            size = file_size(path)
            ranges = list(self.ranges(path, size))
            alone = len(ranges) > 1 or is_compressed(path)  # a compressed file has more text than its size suggests
            if held and (alone or n_bytes + size > PIECE_BYTES or len(held) == PIECE_FILES):
                yield Piece(tuple(held))
                held, n_bytes = [], 0
            if alone:
                yield from (Piece(((name, path),), start, stop) for start, stop in ranges)
            else:
                held.append((name, path))
                n_bytes += size
        if held:
            yield Piece(tuple(held))


@dataclass(frozen=True, kw_only=True)
class PathSource(FileSource):
    """Base class of a source that reads a file, or the files below a folder.

    Attributes:
      path: the file or folder, a ``Path`` or a ``str``, on a local or mounted file system.
    """

    path: Path

    def __post_init__(self):
        check_local(f"{type(self).__name__}.path", self.path)
        object.__setattr__(self, "path", Path(self.path))

    @property
    def source(self) -> str:
        """The name under which the documents of this source are counted: the last part of the path."""
        return self.path.name or self.path.resolve().name  # Path(".").name is empty

    def lost(self, place: str, error: Exception | str, n_bytes: int = 0) -> Skipped:
        """Returns the ``Skipped`` of a file that cannot be read, or cannot be read from ``place`` on.

        Args:
          place: the file, or the file and the position from which on it is lost.
          error: the reason.
          n_bytes: size of the lost part in bytes, if ``error`` has no ``n_bytes`` of its own.
        """
        return Skipped(place, self.source, UNREADABLE, str(error), getattr(error, "n_bytes", n_bytes))


def check_local(field: str, path: object) -> None:
    """Raises ConfigError if a path is a URL."""
    if _URL.match(str(path)):
        raise ConfigError(
            f"{field} is {str(path)!r}, but only files on a local or mounted file system can be read; copy them to "
            "a folder, or mount the store, and give that path"
        )


def byte_ranges(size: int) -> list[tuple[int, int | None]]:
    """Divides a file of ``size`` bytes into ranges (start, stop) of ``RANGE_BYTES``."""
    starts = range(0, max(size, 1), RANGE_BYTES)
    return list(zip(starts, [*starts[1:], None], strict=True))


def ranges_of(sizes: Iterable[int]) -> list[tuple[int, int | None]]:
    """Groups consecutive units, given the bytes of each, into ranges (start, stop) of about ``RANGE_BYTES``."""
    starts, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + size > RANGE_BYTES:
            starts.append(number)
            held = 0
        held += size
    return list(zip(starts, [*starts[1:], None], strict=True))


def as_document(id: str, source: str, text: object, meta: dict, place: str = "") -> Document | Skipped:
    """Makes a document of a value that a reader found in the place of the text, or a ``Skipped`` if it is unusable.

    Args:
      id: the id of the document.
      source: name of the source.
      text: str, or bytes in UTF-8; any other type is skipped as a bad record.
      meta: the metadata of the document.
      place: the id of the ``Skipped``; empty: ``id``.
    """
    place = place or id
    if not isinstance(text, str | bytes):
        return Skipped(place, source, "bad_record", f"the text is {type(text).__name__}, not a string")
    if len(text) > MAX_BYTES:
        return Skipped(place, source, "too_large", f"the text is longer than {MAX_BYTES:,} bytes", len(text))
    try:
        return Document(id, text.decode() if isinstance(text, bytes) else text, source, meta)
    except UnicodeDecodeError as error:
        return Skipped(place, source, "undecodable", str(error), len(text))


def named_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Yields (name, path) of the file ``path``, or of the files with one of ``suffixes`` below the folder ``path``.

    The files of a folder come in sorted order. Suffixes are given in lower case and match names in any case. See
    ``walk`` for what is ignored in a folder.

    Raises CorpusError if there is no such file.
    """
    if path.is_file():
        yield path.name, path
        return
    check_folder(path)
    matching = ((p.relative_to(path).as_posix(), p) for p in walk(path) if p.name.lower().endswith(suffixes))
    shown = " or ".join(suffix for suffix in suffixes if not suffix.endswith(PACKED))
    yield from not_empty(matching, f"the folder {path} holds no {shown} file")


def check_folder(path: Path) -> None:
    """Raises CorpusError if ``path`` is not a folder."""
    if not path.is_dir():
        found = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise CorpusError(f"{path} {found}; check the path of the source")


def not_empty(files: Iterator[tuple[str, Path]], complaint: str) -> Iterator[tuple[str, Path]]:
    """Yields the files.

    Raises CorpusError with the message ``complaint`` if there are none.
    """
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise CorpusError(f"{complaint}; check the source")


def walk(root: Path | str, skip: Collection[str] = _MARKERS, *, hidden: bool = False) -> Iterator[Path]:
    """Yields the files below a folder in sorted order, the files of each folder before those of its subfolders.

    Ignored are pipes, sockets and devices, which would block the reader; links to folders, which may form a cycle; the
    names in ``skip``; and hidden files and folders unless ``hidden`` is set. A link to a file that does not exist is
    yielded, so that the reader reports it.

    Raises CorpusError if a folder cannot be listed.
    """
    try:
        with os.scandir(root) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(
            f"the folder {root} cannot be listed ({error.strerror}); repair it or move it away"
        ) from error
    folders = []
    for entry in entries:
        if entry.name in skip or (entry.name.startswith(".") and not hidden):
            continue
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif _is_data(entry):
            yield Path(entry.path)
    for folder in folders:
        yield from walk(folder, skip, hidden=hidden)


def file_size(path: Path) -> int:
    """Returns the size of a file in bytes, or 0 if it cannot be determined."""
    try:
        return path.stat().st_size
    except OSError:  # reported when the file is read
        return 0


def _is_data(entry: os.DirEntry) -> bool:
    """Returns whether the entry is a file, a link to a file or a broken link."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # for example, a link to itself
        return True
