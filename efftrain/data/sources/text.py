"""Reads documents from text files: one document per file, or a long file that is cut into documents."""

import codecs
import fnmatch
import io
import os
import site
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from efftrain.data.documents import GROUP, UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import FileSource, PathSource, Piece, check_folder, file_size, not_empty, walk
from efftrain.data.sources.compressed import PACKED, is_plain_utf8, open_bytes, open_utf8
from efftrain.data.sources.cutting import Cut, cut

_FIRST = 1 << 18  # bytes that are read at first, so that small files do not allocate a buffer for the largest one


@dataclass(frozen=True, kw_only=True)
class PythonFiles(FileSource):
    """Reads the ``.py`` files of the running interpreter: its standard library and every installed distribution.

    An id is ``stdlib/json/decoder.py`` or ``site-packages/numpy/linalg/_linalg.py``, for example, with the group
    ``json`` or ``numpy``. Symbolic links are not followed, so that no file is read twice and no cycle is entered.

    Attributes:
      standard_library_only: read the standard library alone, without the installed distributions.
    """

    kind: ClassVar[str] = "code"

    standard_library_only: bool = False

    def files(self) -> Iterator[tuple[str, Path]]:
        for name, root in self._roots():
            for path in walk(root, skip=("__pycache__", "site-packages", "dist-packages"), hidden=True):
                if path.suffix == ".py" and not path.is_symlink():
                    yield f"{name}/{path.relative_to(root).as_posix()}", path

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            source, package = name.split("/")[:2]
            meta = {GROUP: package.removesuffix(".py")}
            yield _read_file(path, name, source, meta, open_bytes, _decode_python)

    def _roots(self) -> list[tuple[str, Path]]:
        library = Path(os.path.realpath(sysconfig.get_path("stdlib")))
        places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
        installed = dict.fromkeys(Path(os.path.realpath(place)) for place in places)
        roots = [("stdlib", library)]
        if not self.standard_library_only:
            # Some systems install pure and compiled packages into two folders, which never contain the same file.
            roots += [("site-packages", root) for root in sorted(installed) if root.is_dir() and root != library]
        return roots


@dataclass(frozen=True, kw_only=True)
class TextFolder(PathSource):
    """Reads UTF-8 text from a file, or from every file below a folder whose name matches a pattern.

    UTF-16 and UTF-32 are read if a byte order mark declares them, and files may be compressed (``.gz``, ``.zst``,
    ``.bz2``, ``.xz``). The id of a document is the path of its file below the folder. If files are cut into documents,
    it is ``path@byte``, the position of the document in the uncompressed file, and blank lines before and after the
    document are removed. See ``sources.base.walk`` for what is ignored in a folder.

    Attributes:
      pattern: shell pattern of the names of files in a folder, without the suffix of a compressed file; it ignores
        case.
      group_by_folder: use the first folder below ``path`` as the group of the documents in it.
      split: where a file is cut into documents. None: each file is one document, of at most 64 MB.
    """

    pattern: str = "*.txt"
    group_by_folder: bool = False
    split: Cut | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        if self.path.is_file():
            yield self.path.name, self.path
            return
        check_folder(self.path)
        found = walk(self.path, hidden=self.pattern.startswith("."))
        named = ((path.relative_to(self.path).as_posix(), path) for path in found if self._matches(path.name))
        yield from not_empty(named, f"the folder {self.path} holds no file that matches {self.pattern!r}")

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Returns byte ranges that begin with a document, if files are cut. A large file is read once to find them."""
        if self.split is None or size <= sources.RANGE_BYTES or not is_plain_utf8(path):
            return [(0, None)]
        starts = [0]
        try:
            with open_bytes(path) as stream:
                for place, _ in cut(stream, self.split):
                    if place - starts[-1] >= sources.RANGE_BYTES:
                        starts.append(place)
        except OSError:  # reported when the documents are read
            return [(0, None)]
        return zip(starts, [*starts[1:], None], strict=True)

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        for name, path in piece.files:
            folder, _, rest = name.partition("/")
            meta = {GROUP: folder} if rest and self.group_by_folder else {}
            if self.split is None:
                advice = "; cut it into documents with split=AtBlankLines() or AtPattern(...)"
                yield _read_file(path, name, self.source, meta, open_utf8, bytes.decode, advice)
            else:
                yield from self._parts(name, path, meta, piece.start, piece.stop)

    def _parts(self, name: str, path: Path, meta: dict, start: int, stop: int | None) -> Iterator[Document | Skipped]:
        assert self.split is not None  # otherwise a file is one document
        place = start
        try:
            with open_utf8(path) as stream:
                if start:
                    stream.seek(start)
                for place, content in cut(stream, self.split, start, stop):
                    id = f"{name}@{place}"
                    try:
                        text = content.removeprefix(codecs.BOM_UTF8).decode().lstrip("\r\n").rstrip()
                    except UnicodeDecodeError as error:
                        yield Skipped(id, self.source, "undecodable", str(error), len(content))
                        continue
                    if text:
                        yield Document(id, text, self.source, meta)
        except OSError as error:
            yield self.lost(f"{name}@{place}", error, max(file_size(path) - place, 0))

    def _matches(self, name: str) -> bool:
        name, pattern = name.lower(), self.pattern.lower()
        return any(fnmatch.fnmatchcase(name.removesuffix(suffix), pattern) for suffix in ("", *PACKED))


def _read_file(
    path: Path,
    name: str,
    source: str,
    meta: dict,
    open_file: Callable[[Path], io.BufferedReader],
    decode: Callable[[bytes], str],
    advice: str = "",
) -> Document | Skipped:
    """Reads a file as one document.

    Args:
      decode: decodes the bytes to text, or raises UnicodeError, LookupError or SyntaxError.
      advice: is appended to the message for a file that is too large.
    """
    most = sources.MAX_BYTES
    try:
        with open_file(path) as stream:
            content = stream.read(min(_FIRST, most + 1))
            if len(content) == _FIRST:
                content += stream.read(most + 1 - _FIRST)
    except OSError as error:
        return Skipped(name, source, UNREADABLE, str(error), getattr(error, "n_bytes", file_size(path)))
    if len(content) > most:
        return Skipped(name, source, "too_large", f"the file has more than {most:,} bytes{advice}", file_size(path))
    try:
        return Document(name, decode(content), source, meta)
    except (UnicodeError, LookupError, SyntaxError) as error:
        return Skipped(name, source, "undecodable", str(error), len(content))


def _decode_python(content: bytes) -> str:
    """Decodes Python source in the encoding of its PEP 263 declaration or byte order mark."""
    encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding)
