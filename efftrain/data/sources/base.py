"""What a source of documents is, and what the sources share.

A source lists its files, for the fingerprint of the inputs, cuts them into pieces, and streams the documents of a
piece. Pieces are what workers share out and what a resumed build continues at: they depend on the files alone and
never on the number of workers.
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

# A larger file or line is counted as skipped and never held in memory.
MAX_BYTES = 64 << 20

PIECE_BYTES = 16 << 20  # small files are read together up to here: about a second of work
PIECE_FILES = 2000
RANGE_BYTES = 32 << 20  # a file that is larger is read in ranges of about this size

# What other programs leave beside their data: Spark, Hive, Delta Lake.
_MARKERS = frozenset({"_SUCCESS", "_metadata", "_common_metadata", "_temporary", "_delta_log"})
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib makes one slash of two


@dataclass(frozen=True)
class Piece:
    """A part of a source that one worker reads in one go.

    Attributes:
      files: (name, path) as in ``Source.files``.
      start: first unit of a range, where the piece is a part of one file. The source decides what it counts: bytes,
        row groups, record batches or records.
      stop: the first unit after the range; None for all that is left.
    """

    files: tuple[tuple[str, Path], ...]
    start: int = 0
    stop: int | None = None


class Source(Protocol):
    """A frozen dataclass that says what to read; nothing is opened before an iteration begins.

    Attributes:
      kind: what its texts are: "text" (prose), "code" or "web". The default rules of a corpus follow it.
    """

    kind: ClassVar[str]

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yields (name, path) of each file that is read, always in the same order.

        Raises CorpusError if there is none.
        """

    def pieces(self) -> Iterator[Piece]:
        """Yields the parts of the source, in the order of ``files``. Equal files give equal pieces."""

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        """Yields what a piece holds, one document in memory at a time."""


class FileSource:
    """The base of a source of files: ``files`` and ``documents`` are enough, the pieces are made here."""

    kind: ClassVar[str] = "text"

    def files(self) -> Iterator[tuple[str, Path]]:
        raise NotImplementedError

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        raise NotImplementedError

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """The (start, stop) of the pieces of one file of ``size`` bytes. Here: the whole file."""
        return [(0, None)]

    def pieces(self) -> Iterator[Piece]:
        """Whole files together up to 16 MB or 2,000 files; a file with several ranges by itself."""
        held: list[tuple[str, Path]] = []
        n_bytes = 0
        for name, path in self.files():
            size = file_size(path)
            ranges = list(self.ranges(path, size))
            alone = len(ranges) > 1 or is_compressed(path)  # a compressed file holds more than its size says
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
    """The base of a source that reads a file, or the files below a folder.

    Attributes:
      path: a ``Path`` or a ``str``, on a file system of this machine.
    """

    path: Path

    def __post_init__(self):
        check_local(f"{type(self).__name__}.path", self.path)
        object.__setattr__(self, "path", Path(self.path))

    @property
    def source(self) -> str:
        """The name under which its documents are counted: the last part of the path."""
        return self.path.name or self.path.resolve().name  # "." has no name

    def lost(self, place: str, error: Exception | str, n_bytes: int = 0) -> Skipped:
        """Says that a file, or what follows ``place`` in it, cannot be read."""
        return Skipped(place, self.source, UNREADABLE, str(error), getattr(error, "n_bytes", n_bytes))


def check_local(field: str, path: object) -> None:
    """Raises ConfigError where a path is a URL."""
    if _URL.match(str(path)):
        raise ConfigError(
            f"{field} is {str(path)!r}, and only files on a local or mounted file system are read; copy them to a "
            "folder, or mount the store, and give that path"
        )


def byte_ranges(size: int) -> list[tuple[int, int | None]]:
    """Ranges (start, stop) of ``RANGE_BYTES`` of a file of ``size`` bytes."""
    starts = range(0, max(size, 1), RANGE_BYTES)
    return list(zip(starts, [*starts[1:], None], strict=True))


def ranges_of(sizes: Iterable[int]) -> list[tuple[int, int | None]]:
    """Cuts units of the given bytes, in their order, into ranges (start, stop) of about ``RANGE_BYTES``."""
    starts, held = [0], 0
    for number, size in enumerate(sizes):
        if held and held + size > RANGE_BYTES:
            starts.append(number)
            held = 0
        held += size
    return list(zip(starts, [*starts[1:], None], strict=True))


def as_document(id: str, source: str, text: object, meta: dict, place: str = "") -> Document | Skipped:
    """A document of what a reader found where the text should be.

    Args:
      text: str, or bytes in UTF-8; anything else is a bad record.
      place: names it where it is skipped; by default its id.
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
    """The file ``path``, or the files below the folder ``path`` that end in one of ``suffixes``, in sorted order.

    Suffixes are in lower case and match names in any case. See ``walk`` for what is passed over in a folder.

    Raises CorpusError if there is none.
    """
    if path.is_file():
        yield path.name, path
        return
    check_folder(path)
    matching = ((p.relative_to(path).as_posix(), p) for p in walk(path) if p.name.lower().endswith(suffixes))
    shown = " or ".join(suffix for suffix in suffixes if not suffix.endswith(PACKED))
    yield from not_empty(matching, f"the folder {path} holds no {shown} file")


def check_folder(path: Path) -> None:
    """Raises CorpusError where ``path`` is no folder."""
    if not path.is_dir():
        found = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise CorpusError(f"{path} {found}; check the path of the source")


def not_empty(files: Iterator[tuple[str, Path]], complaint: str) -> Iterator[tuple[str, Path]]:
    """The files.

    Raises CorpusError with ``complaint`` if there is none.
    """
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise CorpusError(f"{complaint}; check the source")


def walk(root: Path | str, skip: Collection[str] = _MARKERS, *, hidden: bool = False) -> Iterator[Path]:
    """The files below a folder, in sorted order, those of a folder before those of its folders.

    Left out are pipes, sockets and devices, which would block the reader, links to folders, which may form a circle,
    the names in ``skip``, and hidden files and folders unless ``hidden`` is set. A link to a file that does not exist
    is yielded, so that the reader reports it.

    Raises CorpusError where a folder cannot be listed.
    """
    try:
        with os.scandir(root) as listed:
            entries = sorted(listed, key=lambda entry: entry.name)
    except OSError as error:
        raise CorpusError(f"the folder {root} cannot be listed ({error.strerror}); mend it or move it away") from error
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
    """In bytes; 0 where the file cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:  # the reader will list it
        return 0


def _is_data(entry: os.DirEntry) -> bool:
    """Whether it is a file, or a link that leads to a file or nowhere."""
    try:
        return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))
    except OSError:  # a link to itself, for one
        return True
