"""Reads documents from web archives: WARC files with HTML, and WET files with the text that a crawler extracted."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

from efftrain.data.documents import GROUP, UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import PathSource, Piece, as_document, named_files
from efftrain.data.sources.warc.page import UnpackError, decode_page, parse_response, unpacked_body
from efftrain.data.sources.warc.records import MAX_HEADER, Lost, Record, records, target
from efftrain.errors import ConfigError

_SUFFIXES = tuple(f".{kind}{packing}" for kind in ("warc", "wet") for packing in ("", ".gz", ".zst"))
_NO_DOCUMENTS = ("warcinfo", "resource", "request", "metadata", "revisit", "continuation")
_HTML = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, kw_only=True)
class Warc(PathSource):
    """Reads the pages of a ``.warc[.gz|.zst]`` or ``.wet[.gz|.zst]`` file, or of all such files below a folder.

    Needs the extra ``warc``. A response with status 200 and HTML becomes a document, whose text is extracted with
    Resiliparse (Bevendorff et al. 2018), as for DCLM (Li et al. 2024). A ``conversion`` record contains the text
    itself. Other responses are reported as skipped; other types of records are ignored. The id of a document is
    ``file@byte``, the position of its record in the uncompressed file. Its ``meta`` has the URL and, as the group,
    the host, so that a site stays in one split.

    A damaged record is skipped as ``bad_record``, with the number of bytes up to the next record. If no record follows,
    or if a compressed member with several records is damaged, the number of lost records is unknown, and the part is
    reported as ``unreadable``.

    Attributes:
      main_content: extract the main content alone, without navigation, footers and the like.
    """

    kind: ClassVar[str] = "web"

    main_content: bool = True

    def files(self) -> Iterator[tuple[str, Path]]:
        _require_resiliparse()
        yield from named_files(self.path, _SUFFIXES)

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        _require_resiliparse()
        for name, path in piece.files:
            place = 0
            try:
                for item in records(path, sources.MAX_BYTES + MAX_HEADER):
                    place = item.place
                    found = self._lost(name, item) if isinstance(item, Lost) else self._item(f"{name}@{place}", item)
                    if found is not None:
                        yield found
            except OSError as error:
                yield Skipped(f"{name}@{place}", self.source, UNREADABLE, f"after this place: {error}")

    def _lost(self, name: str, lost: Lost) -> Skipped:
        what = f"{lost.n_bytes:,} bytes were skipped" + ", which may be many records" * lost.rest
        detail = f"{lost.reason}; {what}: {lost.url}".removesuffix(": ")
        rule = UNREADABLE if lost.rest else "bad_record"
        return Skipped(f"{name}@{lost.place}", self.source, rule, detail, lost.n_bytes)

    def _item(self, place: str, record: Record) -> Document | Skipped | None:
        kind, url = record.fields["warc-type"].lower(), target(record.fields)
        if kind in _NO_DOCUMENTS:
            return None
        if kind not in ("response", "conversion"):
            return self._bad(place, f"the WARC-Type {kind!r} is not known: {url}", record)
        if "warc-segment-number" in record.fields:
            return self._bad(place, f"the record is one of several segments, which are not joined: {url}", record)
        if record.block is None:
            return self._too_large(place, url)
        if kind == "response":
            return self._page(place, url, record, record.block)
        return self._document(place, url, record.block)

    def _page(self, place: str, url: str, record: Record, block: bytes) -> Document | Skipped:
        from resiliparse.extract.html2text import extract_plain_text

        protocol = _media_type(record.fields.get("content-type", "application/http"))
        if protocol != "application/http":
            return Skipped(place, self.source, "not_html", f"{protocol} {url}")
        response = parse_response(block)
        if response is None:
            return self._bad(place, f"the response does not begin with an HTTP status line: {url}", record)
        content_type = response.fields.get("content-type", "")
        if response.status != "200":
            return Skipped(place, self.source, "http_status", f"{response.status} {url}")
        if _media_type(content_type) not in _HTML:
            return Skipped(place, self.source, "not_html", f"{_media_type(content_type)} {url}")
        if len(response.body) > sources.MAX_BYTES:
            return self._too_large(place, url)
        try:
            content = unpacked_body(response, sources.MAX_BYTES, "warc-truncated" in record.fields)
            if len(content) > sources.MAX_BYTES:
                return self._too_large(place, url)
            html = decode_page(content, content_type)
        except (UnpackError, UnicodeError) as error:
            return Skipped(place, self.source, "undecodable", f"{error}: {url}", len(response.body))
        return self._document(place, url, extract_plain_text(html, main_content=self.main_content, alt_texts=False))

    def _document(self, place: str, url: str, text: str | bytes) -> Document | Skipped:
        meta = ({"url": url} if url else {}) | ({GROUP: host} if (host := _host(url)) else {})
        return as_document(place, self.source, text, meta)

    def _bad(self, place: str, detail: str, record: Record) -> Skipped:
        return Skipped(place, self.source, "bad_record", detail, len(record.block or b""))

    def _too_large(self, place: str, url: str) -> Skipped:
        detail = f"more than {sources.MAX_BYTES:,} bytes: {url}"
        return Skipped(place, self.source, "too_large", detail, sources.MAX_BYTES)


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # for example, an unclosed bracket
        return ""


def _require_resiliparse() -> None:
    try:
        import resiliparse.extract.html2text  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Warc needs the packages of an extra ({error}); pip install 'efftrain[warc]'") from error
