"""Where documents come from.

A source lists its files, for the fingerprint of the inputs, cuts them into pieces, and streams the documents of a
piece. Pieces are what workers share out and what a resumed build continues at: they depend on the files alone and
never on the number of workers.
"""

import fnmatch
import io
import json
import os
import site
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from efftrain.data.compressed import is_compressed, lines, open_bytes, reading_errors
from efftrain.data.documents import Document, Skipped
from efftrain.errors import CorpusError

# A larger file or line is counted as skipped and never held in memory.
MAX_BYTES = 64 << 20

PIECE_BYTES = 16 << 20  # small files are read together up to here: about a second of work
PIECE_FILES = 2000
RANGE_BYTES = 32 << 20  # a file that is larger is read in ranges of about this size


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
    """A frozen dataclass that says what to read; nothing is opened before an iteration begins."""

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
            size = _size(path)
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
class PythonFiles(FileSource):
    """The ``.py`` files of the running interpreter: its standard library and every installed distribution.

    The id is ``stdlib/json/decoder.py`` or ``site-packages/numpy/linalg/_linalg.py``; the package is ``json`` or
    ``numpy``. Symbolic links are not followed, so that nothing is read twice and no cycle is entered.
    """

    standard_library_only: bool = False

    def files(self) -> Iterator[tuple[str, Path]]:
        for name, root in self._roots():
            for path in _walk(root, skip=("__pycache__", "site-packages", "dist-packages")):
                if path.suffix == ".py" and not path.is_symlink():
                    yield f"{name}/{path.relative_to(root).as_posix()}", path

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            source, package = name.split("/")[:2]
            yield _read_file(path, name, source, {"package": package.removesuffix(".py")}, _decode_python)

    def _roots(self) -> list[tuple[str, Path]]:
        library = Path(os.path.realpath(sysconfig.get_path("stdlib")))
        places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        installed = dict.fromkeys(Path(os.path.realpath(place)) for place in places)
        roots = [("stdlib", library)]
        if not self.standard_library_only:
            # A distribution that keeps pure and compiled packages apart has two folders, never with the same
            # file.
            roots += [("site-packages", root) for root in sorted(installed) if root.is_dir() and root != library]
        return roots


@dataclass(frozen=True, kw_only=True)
class TextFolder(FileSource):
    """Every file below a folder whose name matches a pattern is one document, in UTF-8.

    The id is the path below the folder; the package is its first folder, if there is one and ``package_by_folder`` is
    set.
    """

    path: Path
    pattern: str = "*.txt"
    package_by_folder: bool = False

    def files(self) -> Iterator[tuple[str, Path]]:
        if not self.path.is_dir():
            raise CorpusError(f"there is no folder {self.path}; give TextFolder the path of a folder")
        matching = (p for p in _walk(self.path) if fnmatch.fnmatch(p.name, self.pattern))
        named = ((path.relative_to(self.path).as_posix(), path) for path in matching)
        yield from _not_empty(named, f"the folder {self.path} holds no file that matches {self.pattern!r}")

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            folder, _, rest = name.partition("/")
            meta = {"package": folder} if rest and self.package_by_folder else {}
            yield _read_file(path, name, self.path.name, meta, bytes.decode)


@dataclass(frozen=True, kw_only=True)
class JsonLines(FileSource):
    """One JSON object a line, in a file or a folder of files: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.

    A line is named ``file@byte``, by where it begins in the unpacked file: unlike its number, that is known wherever
    reading starts (``tail -c +$((byte + 1)) file | head -1`` shows it).

    Attributes:
      text_field: the field that holds the text.
      id_field: the field that holds the id; by default ``file@byte``.
      package_field: the field that names the group which must stay in one split.
    """

    path: Path
    text_field: str = "text"
    id_field: str | None = None
    package_field: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from named_files(self.path, (".jsonl", ".jsonl.gz", ".jsonl.zst"))

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Ranges of bytes. A line belongs to the range in which it begins."""
        if is_compressed(path) or size <= RANGE_BYTES:
            return [(0, None)]
        starts = range(0, size, RANGE_BYTES)
        return zip(starts, [*starts[1:], None], strict=True)

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            place = piece.start
            try:
                with open_bytes(path) as stream:
                    for place, line in lines(stream, MAX_BYTES, piece.start, piece.stop):
                        if line is None or line.strip():
                            yield self._document(f"{name}@{place}", line)
            except reading_errors() as error:
                yield Skipped(f"{name}@{place}", self.path.name, "unreadable", f"behind this place: {error}")

    def _document(self, place: str, line: bytes | None) -> Document | Skipped:
        source = self.path.name
        if line is None:
            return Skipped(place, source, "too_large", f"the line is longer than {MAX_BYTES:,} bytes", MAX_BYTES)
        try:
            row = json.loads(line)
            text = row[self.text_field]
            if not isinstance(text, str):
                raise TypeError(f"field {self.text_field!r} is {type(text).__name__}, not a string")
            package = {"package": str(row[self.package_field])} if self.package_field else {}
            return Document(str(row[self.id_field]) if self.id_field else place, text, source, package)
        except UnicodeDecodeError as error:
            return Skipped(place, source, "undecodable", str(error), len(line))
        except KeyError as error:
            return Skipped(place, source, "bad_record", f"there is no field {error}", len(line))
        except (ValueError, TypeError, RecursionError) as error:
            return Skipped(place, source, "bad_record", str(error), len(line))


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


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # the reader will list it
        return 0


def _walk(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip)
        yield from (Path(folder, name) for name in sorted(names))


def named_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """The file ``path``, or the files below the folder ``path`` that end in one of ``suffixes``, in sorted order.

    Raises CorpusError if there is none.
    """
    if path.is_file():
        yield path.name, path
        return
    if not path.is_dir():
        raise CorpusError(f"there is no file or folder {path}; check the path of the source")
    matching = ((p.relative_to(path).as_posix(), p) for p in _walk(path) if p.name.endswith(suffixes))
    yield from _not_empty(matching, f"the folder {path} holds no {' or '.join(suffixes)} file")


def _not_empty(files: Iterator[tuple[str, Path]], complaint: str) -> Iterator[tuple[str, Path]]:
    empty = True
    for file in files:
        empty = False
        yield file
    if empty:
        raise CorpusError(f"{complaint}; check the source")


def _read_file(path: Path, name: str, source: str, meta: dict, decode) -> Document | Skipped:
    """One file as one document.

    ``decode`` turns its bytes into text or raises a UnicodeError, LookupError or SyntaxError.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            return Skipped(name, source, "too_large", f"the file has more than {MAX_BYTES:,} bytes", size)
        content = path.read_bytes()
    except OSError as error:
        return Skipped(name, source, "unreadable", str(error))
    try:
        return Document(name, decode(content), source, meta)
    except (UnicodeError, LookupError, SyntaxError) as error:
        return Skipped(name, source, "undecodable", str(error), len(content))


def _decode_python(content: bytes) -> str:
    """Honours the coding line of PEP 263 and a byte order mark; newlines stay as they are."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)
