import builtins
import gzip
import tracemalloc
import zlib

import brotli
import pytest
import zstandard
from warc_archives import page, read_parts

from efftrain.data.sources import base as sources

CHINESE = "这是一个用中文写的网页，里面有足够多的文字，可以让人看出它的编码。" * 3
JAPANESE = "これは日本語で書かれたページです。①から⑨までの番号も使われています。" * 3
RUSSIAN = "Это страница на русском языке, в которой достаточно слов для определения кодировки. " * 3
GERMAN = "Ein Absatz über Fische und Vögel, der groß genug ist – „so“ heißt es. " * 3


def html(text: str, meta: str = "") -> str:
    return f"<html><head>{meta}</head><body><main><p>{text}</p></main></body></html>"


def packed(body: bytes, encoding: str, *headers: str, **fields: str) -> bytes:
    return page(body, "Content-Type: text/html; charset=utf-8", f"Content-Encoding: {encoding}", *headers, **fields)


def compress_raw(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def in_frames(body: bytes) -> bytes:
    return zstandard.compress(body[:99]) + zstandard.compress(body[99:])


PACKERS = [
    ("br", lambda body: brotli.compress(body, quality=5)),
    ("zstd", zstandard.compress),
    ("zstd", in_frames),
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", compress_raw),
    ("GZIP, br", lambda body: brotli.compress(gzip.compress(body))),
    ("identity", bytes),
]


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_page_bytes_are_unpacked(tmp_path, encoding, pack):
    body = pack(html(GERMAN).encode())
    in_chunks = b"".join(
        b"%x\r\n%s\r\n" % (len(body[at : at + 40]), body[at : at + 40]) for at in range(0, len(body), 40)
    )
    parts = [
        packed(body, encoding),
        packed(in_chunks + b"0\r\n\r\n", encoding, "Transfer-Encoding: Chunked"),
        packed(html(GERMAN).encode(), encoding),  # stored unpacked, under the server's header
        page(b"<p>next</p>"),
    ]
    *pages, following = read_parts(tmp_path, "warc", parts)
    assert [item.text.strip() for item in pages] == [GERMAN.strip()] * 3
    assert following.text.strip() == "next"


@pytest.mark.parametrize(("encoding", "pack"), PACKERS[:-1])
def test_damaged_page_bytes_cost_that_page(tmp_path, encoding, pack):
    """Neither an exception nor packed bytes or half a page as text."""
    body = pack(html(" ".join(f"Wort{n}" for n in range(999))).encode())
    broken = bytes([body[0] ^ 255]) + body[1:]
    parts = [packed(body[: len(body) // 2], encoding), packed(broken, encoding), page(b"<p>next</p>")]
    *lost, following = read_parts(tmp_path, "warc", parts)
    assert [item.rule for item in lost] == ["undecodable"] * 2
    assert all("https://a.example/" in item.detail for item in lost)
    assert lost[0].n_bytes == len(body) // 2
    assert following.text.strip() == "next"


@pytest.mark.parametrize(("encoding", "pack"), [item for item in PACKERS if item[0] in ("br", "gzip", "deflate")])
def test_a_page_that_its_record_calls_truncated_is_kept_as_far_as_it_goes(tmp_path, encoding, pack):
    body = pack(html(" ".join(f"Wort{n}" for n in range(9999))).encode())
    (item,) = read_parts(tmp_path, "warc", [packed(body[: len(body) // 2], encoding, WARC_Truncated="length")])
    assert item.text.startswith("Wort0 Wort1 ")


def test_an_unknown_encoding_is_skipped(tmp_path):
    lost, following = read_parts(tmp_path, "warc", [packed(b"\x01packed", "compress"), page(b"<p>next</p>")])
    assert lost.rule == "undecodable"
    assert "'compress' is not known" in lost.detail
    assert following.text.strip() == "next"


def test_without_brotli_its_name_is_said(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "brotli":
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    body = brotli.compress(html(GERMAN).encode())
    lost, following = read_parts(tmp_path, "warc", [packed(body, "br"), page(b"<p>next</p>")])
    assert lost.rule == "undecodable"
    assert "pip install 'brotli>=1.2'" in lost.detail
    assert following.text.strip() == "next"


@pytest.mark.parametrize(("encoding", "pack"), [PACKERS[n] for n in (0, 1, 3, 5, 6)])
def test_what_unpacks_to_more_than_fits_is_too_large(tmp_path, monkeypatch, encoding, pack):
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    record = packed(pack(bytes(64 << 20)), encoding)
    tracemalloc.start()
    (item,) = read_parts(tmp_path, "warc", [record])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert item.rule == "too_large"
    assert peak < 50 << 20


@pytest.mark.parametrize("encoding", ["gbk", "gb18030"])
@pytest.mark.parametrize(
    ("declared", "in_meta"),
    [
        ("; charset=utf-8", ""),
        ("; charset=utf-8", "<meta charset=gb2312>"),
        ("; charset=utf-8", "<meta http-equiv=Content-Type content='text/html; charset=gbk'>"),
        ("; charset=utf-8", "<meta charset=utf-8>"),
        ("; charset=iso-8859-1", "<meta charset=gb2312>"),
        ("", ""),
    ],
)
def test_a_chinese_page_under_any_header(tmp_path, declared, in_meta, encoding):
    record = page(html(CHINESE, in_meta).encode(encoding), f"Content-Type: text/html{declared}")
    (item,) = read_parts(tmp_path, "warc", [record])
    assert item.text.strip() == CHINESE


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [
        (JAPANESE, "cp932", "utf-8"),
        (JAPANESE, "cp932", "Shift_JIS"),  # with characters that Python's codec of this name does not know
        (JAPANESE, "utf-8", "Shift_JIS"),
        (RUSSIAN, "cp1251", "utf-8"),
        (RUSSIAN, "utf-8", "windows-1251"),
        (GERMAN, "cp1252", "utf-8"),
        (GERMAN, "utf-8", "iso-8859-1"),  # what a server says by default
        (GERMAN, "utf-8", "utf-16"),
        (GERMAN, "utf-8", "no-such-encoding"),
        ("words in ASCII alone", "ascii", "utf-16"),
        (GERMAN, "utf-16", "utf-8"),
        (GERMAN, "utf-8-sig", "iso-8859-1"),
        (JAPANESE.replace("①から⑨", ""), "iso2022_jp", "iso-2022-jp"),
        (GERMAN, "utf-16-le", "utf-16le"),
    ],
)
def test_a_wrong_declaration_makes_no_wrong_letters(tmp_path, text, encoding, declared):
    record = page(html(text).encode(encoding), f"Content-Type: text/html; charset={declared}")
    (item,) = read_parts(tmp_path, "warc", [record])
    assert item.text.strip() == text.strip()


@pytest.mark.parametrize("declared", ["utf-8", "iso-8859-1"])
def test_one_invalid_byte_does_not_change_the_other_letters(tmp_path, declared):
    body = html(GERMAN).encode().replace(b"Absatz", b"Abs\xe4tz", 1)
    (item,) = read_parts(tmp_path, "warc", [page(body, f"Content-Type: text/html; charset={declared}")])
    assert item.text.strip() == GERMAN.replace("Absatz", "Abs\ufffdtz", 1).strip()


def test_bytes_in_no_encoding_are_skipped(tmp_path):
    body = b"<html>" + bytes(range(128, 256)) * 20
    (item,) = read_parts(tmp_path, "warc", [page(body, "Content-Type: text/html; charset=utf-8")])
    assert item.rule == "undecodable"
    assert "utf-8" in item.detail


def test_chunks_that_break_off(tmp_path):
    chunked = ("Content-Type: text/html", "Transfer-Encoding: chunked")
    parts = [
        page(b"ff\r\n<p>too short</p>", *chunked),
        page(b"10\r\n<p>first</p>1234\r\nnot a size\r\n", *chunked),
        page(b"c\r\n<p>whole</p>\r\n", *chunked),  # without the chunk of size 0
        page(b"<p>unchunked</p>", *chunked),
    ]
    short, broken, *pages = read_parts(tmp_path, "warc", parts)
    assert [short.rule, broken.rule] == ["undecodable", "undecodable"]
    assert [item.text.strip() for item in pages] == ["whole", "unchunked"]
