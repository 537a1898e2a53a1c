"""Where documents come from.

A source lists its files, for the fingerprint of the inputs, and streams their documents.
"""

import fnmatch
import io
import json
import os
import site
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from efftrain.data.compressed import lines, open_bytes, reading_errors
from efftrain.data.documents import Document, Skipped
from efftrain.errors import CorpusError

# A larger file or line is counted as skipped and never held in memory.
MAX_BYTES = 64 << 20


class Source(Protocol):
    """A frozen dataclass that says what to read; nothing is opened before ``documents`` is iterated."""

    def files(self) -> Iterator[tuple[str, Path]]:
        """Yields (name, path) of each file that is read, always in the same order.

        Raises CorpusError if there is none.
        """

    def documents(self) -> Iterator[Document | Skipped]:
        """Yields what the files hold, one document in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class PythonFiles:
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

    def documents(self) -> Iterator[Document | Skipped]:
        for name, path in self.files():
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
class TextFolder:
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

    def documents(self) -> Iterator[Document | Skipped]:
        for name, path in self.files():
            folder, _, rest = name.partition("/")
            meta = {"package": folder} if rest and self.package_by_folder else {}
            yield _read_file(path, name, self.path.name, meta, bytes.decode)


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """One JSON object a line, in a file or a folder of files: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.

    Attributes:
      text_field: the field that holds the text.
      id_field: the field that holds the id; by default ``file:line``.
      package_field: the field that names the group which must stay in one split.
    """

    path: Path
    text_field: str = "text"
    id_field: str | None = None
    package_field: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from _named_files(self.path, (".jsonl", ".jsonl.gz", ".jsonl.zst"))

    def documents(self) -> Iterator[Document | Skipped]:
        for name, path in self.files():
            number = 0
            try:
                with open_bytes(path) as stream:
                    for number, line in enumerate(lines(stream, MAX_BYTES), start=1):
                        if line is None or line.strip():
                            yield self._document(name, number, line)
            except reading_errors() as error:
                yield Skipped(f"{name}:{number + 1}", self.path.name, "unreadable", str(error))

    def _document(self, name: str, number: int, line: bytes | None) -> Document | Skipped:
        place, source = f"{name}:{number}", self.path.name
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


@dataclass(frozen=True, kw_only=True)
class Parquet:
    """One row a document, in a file or a folder of ``.parquet`` files. The fields are as in ``JsonLines``."""

    path: Path
    column: str = "text"
    id_column: str | None = None
    package_column: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        yield from _named_files(self.path, (".parquet",))

    def documents(self) -> Iterator[Document | Skipped]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = [c for c in (self.column, self.id_column, self.package_column) if c]
        for name, path in self.files():
            row = 0
            try:
                with pq.ParquetFile(path) as file:
                    if missing := [c for c in columns if c not in file.schema_arrow.names]:
                        found = ", ".join(file.schema_arrow.names)
                        raise CorpusError(f"{path} has no column {missing[0]!r}; it has {found}")
                    for batch in file.iter_batches(batch_size=256, columns=columns):
                        for values in zip(*(batch.column(c) for c in columns), strict=True):
                            yield self._document(name, row, dict(zip(columns, values, strict=True)))
                            row += 1
            except (OSError, pa.ArrowException) as error:
                yield Skipped(f"{name}:{row}", self.path.name, "unreadable", str(error))

    def _document(self, name: str, row: int, values: dict) -> Document | Skipped:
        place, source = f"{name}:{row}", self.path.name
        try:
            text = values[self.column].as_py()
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            return Skipped(place, source, "undecodable", str(error))
        if not isinstance(text, str):
            return Skipped(place, source, "bad_record", f"column {self.column!r} holds {type(text).__name__}")
        package = {"package": str(values[self.package_column])} if self.package_column else {}
        return Document(str(values[self.id_column]) if self.id_column else place, text, source, package)


def _walk(root: Path, skip: tuple[str, ...] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip)
        yield from (Path(folder, name) for name in sorted(names))


def _named_files(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
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
