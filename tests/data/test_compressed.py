"""Packed files: what they are is told by their bytes, and a cut or damaged one is never a short one."""

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import numpy as np
import pytest
import zstandard

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.compressed import PACKED, is_compressed, open_bytes, open_utf8
from efftrain.data.sources.json import JsonLines
from efftrain.data.sources.text import TextFolder

PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def random_lines(n: int) -> bytes:
    rng = np.random.default_rng(0)
    return b"".join(json.dumps({"text": rng.bytes(50).hex()}).encode() + b"\n" for _ in range(n))


def test_every_format_is_tested():
    assert {*PACK} == {*PACKED}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", ["x", "x.jsonl", "x.gz", "x.ZST"])
def test_the_bytes_of_a_file_say_how_it_is_packed(tmp_path, suffix, name):
    """Several members, with and without padding, under any name."""
    content = random_lines(3000)
    path = tmp_path / name
    packed = PACK[suffix](content[:70_000]) + PACK[suffix](b"") + PACK[suffix](content[70_000:])
    path.write_bytes(packed + (bytes(8) if suffix in (".gz", ".xz") else b""))
    assert is_compressed(path)
    with open_bytes(path) as stream:
        assert stream.read() == content
    assert [item.text for item in read(JsonLines(path=path))] == [
        json.loads(line)["text"] for line in content.splitlines()
    ]


@pytest.mark.parametrize("suffix", PACK)
def test_a_file_cut_anywhere_is_one_unreadable_file(tmp_path, suffix):
    packed = PACK[suffix](random_lines(300)) + PACK[suffix](random_lines(5))
    path = tmp_path / f"a.jsonl{suffix}"

    def lost(size: int) -> list[str]:
        path.write_bytes(packed[:size])
        return [item.rule for item in read(JsonLines(path=path)) if isinstance(item, Skipped)]

    assert lost(len(packed)) == []
    for size in [0, 1, 5, *range(20, len(packed), 997), len(packed) - 1]:
        assert lost(size) == [UNREADABLE], size


@pytest.mark.parametrize("suffix", PACK)
def test_a_damaged_second_member_is_not_the_end_and_what_is_left_is_counted(tmp_path, suffix):
    first, rest = PACK[suffix](b'{"text": "a"}\n'), PACK[suffix](random_lines(2000))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(first + b"\x07" * 8 + rest[8:])
    document, lost = read(JsonLines(path=path))
    assert (document.text, lost.rule) == ("a", UNREADABLE)
    assert 0.8 * len(rest) < lost.n_bytes < len(rest)


def test_a_suffix_that_the_bytes_belie_is_an_unreadable_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text('{"text": "never packed"}\n')
    (lost,) = read(JsonLines(path=tmp_path))
    assert (lost.rule, lost.n_bytes) == (UNREADABLE, 0)
    assert "header" in lost.detail


def test_a_zstd_window_of_two_gigabytes_is_read(tmp_path):
    """As of ``zstd --long=31``; the decoder's own limit is 128 MB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=31, enable_ldm=True)
    pack = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # its size is not known beforehand
    (tmp_path / "a.jsonl.zst").write_bytes(pack.compress(b'{"text": "long"}\n') + pack.flush())
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress((tmp_path / "a.jsonl.zst").read_bytes())
    assert [item.text for item in read(JsonLines(path=tmp_path))] == ["long"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_file_that_unpacks_to_a_million_times_its_size_takes_little_memory(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix](b" " * 50_000_000 + b'x\n{"text": "next"}\n'))
    tracemalloc.start()
    items = read(JsonLines(path=path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [getattr(item, "rule", None) for item in items] == ["too_large", None]
    assert items[0].n_bytes == 50_000_002
    assert peak < 20 << 20  # xz keeps 8 MB of what it unpacked


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_in_utf_16_and_utf_32_with_a_byte_order_mark(tmp_path, encoding, suffix):
    texts = ["naïve \U0001f600 数据" * 3000, "two"]
    content = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
    content += "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    packed = PACK.get(suffix, bytes)(content.encode(encoding))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(packed)
    (tmp_path / f"a.txt{suffix}").write_bytes(packed)
    assert [item.text for item in read(JsonLines(path=tmp_path))] == texts
    assert [item.text for item in read(TextFolder(path=tmp_path))] == [content.removeprefix("\ufeff")]


def test_text_that_its_byte_order_mark_belies_is_unreadable(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\0\x00\xd8b\0")  # half a surrogate pair
    (lost,) = read(TextFolder(path=tmp_path))
    assert lost.rule == UNREADABLE


def test_a_stream_that_is_not_read_to_its_end_leaves_no_file_open(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress("\ufeff".encode("utf-16-le") + os.urandom(200_000)))
    before = len(os.listdir("/proc/self/fd"))
    stream = open_utf8(path)
    stream.close()
    with open_bytes(path) as stream:
        assert stream.read(10)
    assert len(os.listdir("/proc/self/fd")) == before
