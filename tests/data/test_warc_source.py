import builtins
import gzip
import io
import random
from pathlib import Path

import pytest
import zstandard
from warc_archives import page as page_record
from warc_archives import read_parts, record
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.warc.source import Warc
from efftrain.errors import ConfigError

# warcio, which writes the archives here, does not close its own temporary files.
pytestmark = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.SpooledTemporaryFile:ResourceWarning")
PROSE = "Ein Absatz über Fische, der lang genug ist, um als Inhalt der Seite zu gelten, und nicht als Menü."


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def page(text: str, meta: str = "") -> str:
    menu = "<nav><ul><li><a href='/'>Start</a></li><li><a href='/x'>Impressum</a></li></ul></nav>"
    script = "<script>var hidden = 1;</script>"
    return f"<html><head>{meta}<title>T</title></head><body>{menu}{script}<main><p>{text}</p></main></body></html>"


def write(path: Path, pages: list[tuple[str, bytes, str, str]], compressed: bool = False) -> Path:
    """Pages of (URL, body, status, content type), each behind its request, after the usual warcinfo."""
    with path.open("wb") as file:
        writer = WARCWriter(file, gzip=compressed)
        writer.write_record(writer.create_warcinfo_record(path.name, {"software": "test"}))
        for url, body, status, kind in pages:
            request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "x")], is_http_request=True)
            writer.write_record(writer.create_warc_record(url, "request", http_headers=request))
            response = StatusAndHeaders(status, [("Content-Type", kind)], protocol="HTTP/1.1")
            writer.write_record(
                writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=response)
            )
    return path


PAGES = [
    ("https://a.example/1", page(PROSE).encode(), "200 OK", "text/html; charset=utf-8"),
    ("https://a.example/2", b"%PDF", "200 OK", "application/pdf"),
    ("https://b.example:80/3", page(PROSE).encode(), "404 Not Found", "text/html"),
    ("https://b.example:80/4", page(PROSE).encode("latin-1"), "200 OK", "text/html; charset=ISO-8859-1"),
    ("http://[broken", page(PROSE, "<meta charset=utf-8>").encode(), "200 OK", "text/html"),
    ("https://c.example/", b"", "200 OK", "text/html"),
    ("https://c.example/0", page(PROSE + "\0x").encode(), "200 OK", "text/html; charset=no-such-thing"),
]


@pytest.mark.parametrize("compressed", [False, True])
def test_pages_become_text_without_menu_and_script(tmp_path, compressed):
    path = write(tmp_path / ("x.warc.gz" if compressed else "x.warc"), PAGES, compressed)
    items = read(Warc(path=tmp_path))
    assert [getattr(item, "rule", None) for item in items] == [None, "not_html", "http_status", None, None, None, None]
    documents = [item for item in items if isinstance(item, Document)]
    assert [item.text.strip() for item in documents[:4]] == [PROSE, PROSE, PROSE, ""]
    assert documents[4].text.startswith(PROSE)
    assert [item.group for item in documents[:2]] == ["a.example", "b.example"]
    assert documents[0].meta["url"] == "https://a.example/1"
    unpacked = gzip.decompress(path.read_bytes()) if compressed else path.read_bytes()
    for item in items:  # the name leads to the record
        name, _, place = item.id.partition("@")
        assert name == path.name
        assert unpacked[int(place) :].startswith(b"WARC/1.0\r\n")
    assert b"https://a.example/1" in unpacked[int(items[0].id.split("@")[1]) :][:400]
    assert b"https://a.example/2" in unpacked[int(items[1].id.split("@")[1]) :][:400]


def test_the_menu_stays_where_all_content_is_wanted(tmp_path):
    write(tmp_path / "x.warc", PAGES[:1])
    (item,) = read(Warc(path=tmp_path, main_content=False))
    assert "Impressum" in item.text
    assert PROSE in item.text


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("transfer", ["gzip", "chunked", "both", "not really gzip"])
def test_a_page_is_unpacked_as_it_was_sent(tmp_path, transfer):
    words = " ".join(f"Wort{n}" for n in range(20_000))
    body = page(words).encode()
    packed = body if transfer in ("chunked", "not really gzip") else gzip.compress(body)
    headers = [("Content-Type", "text/html")]
    headers += [] if transfer == "chunked" else [("Content-Encoding", "gzip")]
    headers += [("Transfer-Encoding", "chunked")] if transfer in ("chunked", "both") else []
    sent = chunked(packed, 7000) if transfer in ("chunked", "both") else packed
    with (tmp_path / "x.warc").open("wb") as file:
        response = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
        writer = WARCWriter(file, gzip=False)
        record = writer.create_warc_record(
            "https://a.example/", "response", payload=io.BytesIO(sent), http_headers=response
        )
        writer.write_record(record)
    (item,) = read(Warc(path=tmp_path))
    assert item.text.split() == words.split()


def test_extracted_text_of_a_crawl_is_taken_as_it_is(tmp_path):
    with (tmp_path / "x.wet.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for body in ("naïve <b>\n".encode(), b"\xff"):
            record = writer.create_warc_record(
                "https://a.example/", "conversion", payload=io.BytesIO(body), warc_content_type="text/plain"
            )
            writer.write_record(record)
    text, broken = read(Warc(path=tmp_path / "x.wet.gz"))
    assert (text.text, text.group) == ("naïve <b>\n", "a.example")
    assert broken.rule == "undecodable"


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", [0.5, 0.97])
def test_a_cut_archive_is_noticed_and_the_next_one_read(tmp_path, compressed, place):
    letters = random.Random(0).choices("abcdefgh ", k=4000)
    pages = [(f"https://a.example/{n}", page("".join(letters)).encode(), "200 OK", "text/html") for n in range(4)]
    suffix = ".warc.gz" if compressed else ".warc"
    path = write(tmp_path / f"a{suffix}", pages, compressed)
    whole = read(Warc(path=tmp_path))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * place)])
    write(tmp_path / f"b{suffix}", PAGES[:1], compressed)
    items = read(Warc(path=tmp_path))
    assert [item.rule for item in items if isinstance(item, Skipped)] == ["unreadable"]
    assert items[-1].text == PROSE
    assert items[:-2] == whole[: len(items) - 2]
    assert len(items) - 2 == (3 if place > 0.9 else 1)


def test_what_is_no_archive_is_listed(tmp_path):
    (tmp_path / "x.warc").write_bytes(b"this is no archive\n" * 100)
    (tmp_path / "y.warc.gz").write_bytes(b"nor is this")
    assert [item.rule for item in read(Warc(path=tmp_path))] == ["unreadable", "unreadable"]


def test_archives_of_every_packing_are_found_in_folders(tmp_path):
    plain = write(tmp_path / "0.warc", PAGES[:1]).read_bytes()
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)):
        for kind in ("warc", "wet"):
            (tmp_path / f"x.{kind}{suffix}").write_bytes(pack(plain))
    (tmp_path / "x.cdx.gz").write_bytes(b"an index")
    (tmp_path / "0.warc").unlink()
    items = read(Warc(path=tmp_path))
    names = ["x.warc", "x.warc.gz", "x.warc.zst", "x.wet", "x.wet.gz", "x.wet.zst"]
    assert [item.id.partition("@")[0] for item in items] == names
    assert {item.text for item in items} == {PROSE}


@pytest.mark.parametrize("packing", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_bytes_tell_how_a_file_is_packed(tmp_path, packing, suffix):
    """Some servers unpack what they send, and some tools forget the suffix."""
    plain = write(tmp_path / "0", PAGES[:1]).read_bytes()
    (tmp_path / f"x.warc{suffix}").write_bytes(packing(plain))
    (item,) = read(Warc(path=tmp_path / f"x.warc{suffix}"))
    assert item.text == PROSE


def test_records_that_are_no_pages(tmp_path):
    parts = [
        record("dns:a.example", b"a.example 1 IN A 1.2.3.4", "response", Content_Type="text/dns"),
        record("https://a.example/1", b"", "response", Content_Type="application/http; msgtype=response"),
        record("https://a.example/2", b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n", "revisit"),
        record("https://a.example/3", b"<p>x</p>", "resource", Content_Type="text/html"),
        record("https://a.example/4", b"x", "screenshot"),
        page_record(b"<p>part</p>", WARC_Segment_Number="1"),
        page_record(b"<p>words</p>", url="<https://a.example/a b>"),
        record("https://a.example/6", b"HTTP/2 200\nContent-Type: text/html\n\n<p>words</p>", "response"),
    ]
    *skipped, wget, http2 = read_parts(tmp_path, "warc", parts)
    assert [item.rule for item in skipped] == ["not_html", "bad_record", "bad_record", "bad_record"]
    assert "screenshot" in skipped[2].detail
    assert "segments" in skipped[3].detail
    assert wget.meta["url"] == "https://a.example/a%20b"
    assert http2.text.strip() == "words"


def test_a_page_too_large_for_memory_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    pages = [("https://a.example/", b"x" * size, "200 OK", "text/html") for size in (1001, 2000, 1000)]
    write(tmp_path / "x.warc.gz", [*pages, PAGES[0]], compressed=True)
    *large, fits, small = read(Warc(path=tmp_path))
    assert [item.rule for item in large] == ["too_large", "too_large"]
    assert fits.text == "x" * 1000
    assert small.text == PROSE


def test_without_the_extra_the_command_that_installs_it_is_said(tmp_path, monkeypatch):
    write(tmp_path / "x.warc", PAGES[:1])
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "resiliparse.extract.html2text":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[warc\]'"):
        list(Warc(path=tmp_path).files())
