"""Documents from web archives: WARC files with HTML, and WET files with the text that a crawler extracted."""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from efftrain.data import sources
from efftrain.data.compressed import open_bytes, reading_errors
from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import FileSource, Piece, as_document, named_files
from efftrain.errors import ConfigError

_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_HTML = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, kw_only=True)
class Warc(FileSource):
    """The pages of a file or a folder of ``.warc[.gz]`` or ``.wet[.gz]`` files. Needs the extra ``warc``.

    A response with status 200 and HTML is a document: Resiliparse finds the encoding and extracts the text
    (Bevendorff et al. 2018), as for DCLM (Li et al. 2024). A ``conversion`` record is the text itself. Other
    responses are skipped; other kinds of records are no documents. A document is named ``file@byte``, by where its
    record begins in the unpacked file; its ``meta`` has the URL and, as the package, the host, so that a site stays
    in one split.

    Attributes:
      main_content: leave out navigation, footers and the like.
    """

    path: Path
    main_content: bool = True

    def files(self) -> Iterator[tuple[str, Path]]:
        _import_warcio()
        yield from named_files(self.path, (".warc", ".warc.gz", ".wet", ".wet.gz"))

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        warcio = _import_warcio()
        for name, path in piece.files:
            place = 0
            try:
                with open_bytes(path) as stream:  # warcio's own gzip reader does not notice a cut file
                    records = warcio.archiveiterator.ArchiveIterator(stream)
                    for record in records:
                        place = records.offset
                        if (item := self._item(f"{name}@{place}", record)) is not None:
                            yield item
                    if stream.read(1):  # raises the EOFError of a cut file again, which warcio takes for the end
                        raise OSError("no record begins here")
            except (*reading_errors(), *_damage(warcio)) as error:
                yield Skipped(f"{name}@{place}", self.path.name, "unreadable", f"behind this place: {error}")

    def _item(self, place: str, record: Any) -> Document | Skipped | None:
        if record.rec_type not in ("response", "conversion"):
            return None
        source = self.path.name
        url = record.rec_headers.get_header("WARC-Target-URI") or ""
        header = ""
        if record.rec_type == "response":
            status = record.http_headers.get_statuscode() if record.http_headers else ""
            header = record.http_headers.get_header("Content-Type", "") if record.http_headers else ""
            kind = header.partition(";")[0].strip().lower()
            if status != "200":
                return Skipped(place, source, "http_status", f"{status} {url}")
            if kind not in _HTML:
                return Skipped(place, source, "not_html", f"{kind} {url}")
        raw = record.raw_stream
        too_large = Skipped(
            place, source, "too_large", f"more than {sources.MAX_BYTES:,} bytes: {url}", sources.MAX_BYTES
        )
        if _left(raw) > sources.MAX_BYTES:  # one chunk of a chunked page may be all of it
            return too_large
        try:
            content = record.content_stream().read(sources.MAX_BYTES + 1)
        except zlib.error as error:  # of the page, not of the archive
            return Skipped(place, source, "undecodable", f"{error}: {url}")
        if len(content) > sources.MAX_BYTES:
            return too_large
        if _left(raw) and not raw.read(1):
            raise EOFError(f"the file ends {_left(raw):,} bytes before the end of this record")
        try:
            text = self._extract(content, header) if record.rec_type == "response" else content
        except (UnicodeError, LookupError) as error:
            return Skipped(place, source, "undecodable", f"{error}: {url}", len(content))
        meta = {"url": url} | ({"package": host} if (host := _host(url)) else {})
        return as_document(place, source, text, meta)

    def _extract(self, content: bytes, content_type: str) -> str:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.encoding import bytes_to_str, detect_encoding, map_encoding_to_html5

        declared = _CHARSET.search(content_type)
        encoding = map_encoding_to_html5(declared[1], fallback_utf8=False) if declared else None
        html = bytes_to_str(content, encoding or detect_encoding(content, from_html_meta=True))
        return extract_plain_text(html, main_content=self.main_content, alt_texts=False)


def _left(stream: Any) -> int:
    """Bytes of a record that were not read; 0 where its header does not say."""
    return getattr(stream, "limit", 0)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # an open bracket, for one
        return ""


def _damage(warcio: Any) -> tuple[type[Exception], ...]:
    return warcio.exceptions.ArchiveLoadFailed, warcio.statusandheaders.StatusAndHeadersParserException


def _import_warcio() -> Any:
    try:
        import resiliparse.extract.html2text  # noqa: F401
        import warcio.archiveiterator
        import warcio.exceptions
        import warcio.statusandheaders
    except ImportError as error:
        raise ConfigError(f"Warc needs the packages of an extra ({error}); pip install 'efftrain[warc]'") from error
    return warcio
