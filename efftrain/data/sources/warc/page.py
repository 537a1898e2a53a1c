"""Decodes the text of a page from an HTTP response: header, transfer and content encodings, character encoding."""

import codecs
import io
import re
import zlib
from dataclasses import dataclass

from efftrain.data.sources.warc.members import Damage, Gzip, MemberEnd, Zstd, unpack
from efftrain.data.sources.warc.records import header_fields

_STATUS = re.compile(rb"HTTP/[\d.]+[ \t]+(\d{3})[^\n]*\n")
_HEADER_END = re.compile(rb"\n\r?\n")
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(;[^\n]*)?\r?\n")
_LINE_END = re.compile(rb"(\r?\n)?")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta\b[^>]*?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_META_BYTES = 4096  # first bytes of the page, in which its meta tag is searched for
_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

# Python's codecs of these names have fewer characters than the encodings that browsers use under the same names.
_WIDER = {"gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}

# Text in another encoding is hardly ever valid in one of these, whereas any bytes are valid in a single-byte encoding.
_MULTI_BYTE = {
    *("utf-8", "utf-16-le", "utf-16-be", "gb18030", "cp932", "cp949", "big5hkscs", "euc_jp", "iso2022_jp"),
}


class UnpackError(ValueError):
    """Raised if the bytes of a page are not in the encoding that its header declares, or there is no decoder for it."""


@dataclass(frozen=True)
class Response:
    """An HTTP response: its status code, its header fields by name in lower case, and its body as it was sent."""

    status: str
    fields: dict[str, str]
    body: bytes


def parse_response(block: bytes) -> Response | None:
    """Parses the block of a record as an HTTP response; None if it does not begin with an HTTP status line."""
    status = _STATUS.match(block)
    if not status:
        return None
    end = _HEADER_END.search(block, status.end() - 1)
    stop, body = (end.start(), end.end()) if end else (len(block), len(block))
    return Response(status[1].decode(), header_fields(block[status.end() : stop]), block[body:])


def unpacked_body(response: Response, max_bytes: int, truncated: bool) -> bytes:
    """Returns the body of a response, with its transfer and content encodings decoded.

    A body that was stored decoded although its header names an encoding is returned as it is.

    Args:
      response: the HTTP response.
      max_bytes: maximum size of a page in bytes. Decoding stops soon after it; the caller recognises a page that is too
        large by the length of the result.
      truncated: the record declares that the body was cut when it was stored; the part that exists is returned.

    Raises UnpackError if the body cannot be decoded.
    """
    body = response.body
    if response.fields.get("transfer-encoding", "").lower() == "chunked":
        body = _without_chunks(body, truncated)
    for encoding in reversed(response.fields.get("content-encoding", "").lower().split(",")):
        try:
            body = _unpacked(body, encoding.strip(), max_bytes, truncated)
        except UnpackError:
            if not body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                raise
    return body


def decode_page(content: bytes, content_type: str) -> str:
    """Decodes the text of a page, in the first encoding that fits its bytes.

    The encodings are tried in this order: that of a byte order mark; the multi-byte encodings that the header or the
    meta tag of the page declare, and UTF-8, if all bytes are valid in them; UTF-8 with a few invalid bytes, which
    become U+FFFD; the declared single-byte encodings; the encoding that Resiliparse detects, if necessary with a few
    invalid bytes.

    Args:
      content: the decompressed bytes of the page.
      content_type: the value of the HTTP field Content-Type.

    Raises UnicodeError if no encoding fits.
    """
    from resiliparse.parse.encoding import detect_encoding

    for mark, name in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(name, "replace")
    declared = _declared_encodings(content, content_type)
    certain = [name for name in declared if name in _MULTI_BYTE]
    if not content.isascii():  # ASCII bytes may also be UTF-16 or ISO-2022-JP, which are tried first
        certain.append("utf-8")
    for name in certain:
        if (text := _strict(content, name)) is not None:
            return text
    if (text := _lenient(content, "utf-8")) is not None:
        return text
    label = detect_encoding(content, from_html_meta=False)
    detected = (_python_name(label) if label else None) or "utf-8"
    for name in [*(name for name in declared if name not in _MULTI_BYTE), detected]:
        if (text := _strict(content, name)) is not None:
            return text
    if (text := _lenient(content, detected)) is not None:
        return text
    raise UnicodeError(f"the page is not valid {' or '.join(dict.fromkeys([*declared, 'utf-8', detected]))}")


def _declared_encodings(content: bytes, content_type: str) -> list[str]:
    head = content[:_META_BYTES]
    header, meta = _CHARSET.search(content_type), _META_CHARSET.search(head)
    names = [_python_name(header[1]) if header else None, _python_name(meta[1].decode()) if meta else None]
    # The tags of a page in UTF-16 contain a zero byte in each character.
    return [name for name in names if name and not (name.startswith("utf-16") and b"\0" not in head)]


def _python_name(label: str) -> str | None:
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, fallback_utf8=False)
    return _WIDER.get(name, name) if name else None


def _strict(content: bytes, encoding: str) -> str | None:
    try:
        return content.decode(encoding)
    except (UnicodeError, LookupError):
        return None


def _lenient(content: bytes, encoding: str) -> str | None:
    """Decodes with U+FFFD for invalid bytes; None unless these are fewer than half of the non-ASCII characters."""
    text = content.decode(encoding, "replace")
    n_invalid = text.count("\ufffd")
    n_outside = len(text) - len(text.encode("ascii", "ignore"))
    return text if 2 * n_invalid < n_outside else None


def _without_chunks(body: bytes, truncated: bool) -> bytes:
    parts, at = [], 0
    while at < len(body):
        size = _CHUNK_SIZE.match(body, at)
        if not size and not at:
            return body  # it was stored without the chunk headers
        if not size:
            raise UnpackError(f"no chunk begins at byte {at:,} of the body")
        n_bytes = int(size[1], 16)
        if not n_bytes:
            break
        parts.append(body[size.end() : size.end() + n_bytes])
        at = size.end() + n_bytes
        if at > len(body) and not truncated:
            raise UnpackError(f"the last chunk ends {at - len(body):,} bytes after the body")
        line_end = _LINE_END.match(body, at)
        at = line_end.end() if line_end else at
    return b"".join(parts)


def _unpacked(body: bytes, encoding: str, max_bytes: int, truncated: bool) -> bytes:
    if encoding in ("", "identity") or not body:
        return body
    if encoding in ("gzip", "x-gzip"):
        return _members(body, Gzip(), max_bytes, truncated)
    if encoding == "zstd":
        return _members(body, Zstd(), max_bytes, truncated)
    if encoding == "deflate":
        return _inflated(body, max_bytes, truncated)
    if encoding == "br":
        return _without_brotli(body, max_bytes, truncated)
    raise UnpackError(f"the content encoding {encoding!r} is not known")


def _members(body: bytes, packing: Gzip | Zstd, max_bytes: int, truncated: bool) -> bytes:
    unpacked = bytearray()
    whole = False  # a gzip member is complete; like browsers, ignore what follows it
    for event in unpack(io.BytesIO(body), packing):
        if isinstance(event, Damage) and not whole and not (event.cut and truncated):
            raise UnpackError(event.reason.replace("file", "body"))
        if isinstance(event, Damage) or len(unpacked) > max_bytes:
            break
        if isinstance(event, bytes):
            unpacked += event
        whole = isinstance(event, MemberEnd) and isinstance(packing, Gzip)
    return bytes(unpacked)


def _inflated(body: bytes, max_bytes: int, truncated: bool) -> bytes:
    """Decodes deflate within a zlib frame, as the standard requires, or without one, as some servers send it."""
    try:
        decoder = zlib.decompressobj()
        unpacked = decoder.decompress(body, max_bytes + 1)
    except zlib.error:
        decoder = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            unpacked = decoder.decompress(body, max_bytes + 1)
        except zlib.error as error:
            raise UnpackError(f"the body is not deflated: {error}") from error
    if len(unpacked) <= max_bytes and not decoder.eof and not truncated:
        raise UnpackError("the deflated body ends early")
    return unpacked


def _without_brotli(body: bytes, max_bytes: int, truncated: bool) -> bytes:
    try:
        import brotli

        decoder = brotli.Decompressor()
        unpacked = decoder.process(body, output_buffer_limit=max_bytes + 1)
    except (ImportError, TypeError) as error:  # TypeError: older versions have no limit of the output
        raise UnpackError(
            "the content encoding br needs the package brotli >= 1.2; pip install 'brotli>=1.2'"
        ) from error
    except brotli.error as error:
        raise UnpackError(f"the body is not in brotli: {error}") from error
    if len(unpacked) <= max_bytes and not decoder.is_finished() and not truncated:
        raise UnpackError("the body in brotli ends early")
    return unpacked
