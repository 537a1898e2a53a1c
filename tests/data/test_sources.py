import gzip
import json
import pickle
import site
import sys
import sysconfig
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from efftrain import data
from efftrain.config import to_json
from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.base import FileSource, Piece
from efftrain.data.sources.json import JsonLines
from efftrain.data.sources.parquet import Parquet
from efftrain.data.sources.text import PythonFiles, TextFolder
from efftrain.errors import ConfigError, CorpusError


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def kept(source) -> dict[str, str]:
    return {item.id: item.text for item in read(source) if isinstance(item, Document)}


def skipped(source) -> dict[str, str]:
    return {item.id: item.rule for item in read(source) if isinstance(item, Skipped)}


@pytest.fixture
def python_folders(tmp_path, monkeypatch):
    library, installed = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {
        library / "json" / "decoder.py": b"x = 1\n",
        library / "argparse.py": b"\xef\xbb\xbfy = 2\n",
        library / "json" / "__pycache__" / "decoder.py": b"no\n",
        installed / "numpy" / "core.py": "# -*- coding: latin-1 -*-\n# \u00e9\n".encode("latin-1"),
        installed / "numpy" / "bad.py": b"# \xff\n",
        installed / "numpy" / "unknown.py": b"# coding: no-such-codec\n",
        installed / "numpy" / "data.txt": b"no\n",
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (installed / "again").symlink_to(installed, target_is_directory=True)
    (installed / "numpy" / "link.py").symlink_to(library / "argparse.py")
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": library, "purelib": installed, "platlib": installed}.get)
    monkeypatch.setattr(site, "getsitepackages", lambda: [str(installed)])


@pytest.mark.usefixtures("python_folders")
def test_python_files_are_read_once_with_their_own_encoding():
    assert kept(PythonFiles()) == {
        "stdlib/argparse.py": "y = 2\n",
        "stdlib/json/decoder.py": "x = 1\n",
        "site-packages/numpy/core.py": "# -*- coding: latin-1 -*-\n# \u00e9\n",
    }
    assert skipped(PythonFiles()) == {
        "site-packages/numpy/bad.py": "undecodable",
        "site-packages/numpy/unknown.py": "undecodable",
    }
    groups = {item.id: item.group for item in read(PythonFiles()) if isinstance(item, Document)}
    assert set(groups.values()) == {"argparse", "json", "numpy"}


@pytest.mark.usefixtures("python_folders")
def test_standard_library_only():
    assert all(name.startswith("stdlib/") for name in kept(PythonFiles(standard_library_only=True)))


def test_the_running_interpreter_has_python_files():
    names = {name for name, _ in PythonFiles().files()}
    assert {"stdlib/argparse.py", "stdlib/json/decoder.py", "site-packages/numpy/__init__.py"} <= names
    assert not any("__pycache__" in name for name in names)
    assert sys.prefix


def test_text_folder_counts_what_it_cannot_decode(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_bytes("naïve\r\n".encode())
    (tmp_path / "two.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "other.md").write_text("no")
    source = TextFolder(path=tmp_path, group_by_folder=True)
    assert kept(source) == {"a/one.txt": "naïve\n"}
    assert skipped(source) == {"two.txt": "undecodable", "gone.txt": "unreadable"}
    assert [d.group for d in read(source) if isinstance(d, Document)] == ["a"]


def test_a_file_too_large_for_memory_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 300}) + "\n" + json.dumps({"text": "z"}) + "\n")
    assert skipped(TextFolder(path=tmp_path)) == {"a.txt": "too_large"}
    assert skipped(JsonLines(path=tmp_path / "b.jsonl")) == {"b.jsonl@0": "too_large"}
    assert kept(JsonLines(path=tmp_path / "b.jsonl")) == {"b.jsonl@313": "z"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_in_every_compression(tmp_path, suffix):
    lines = b'{"text": "one", "n": 1, "repo": "r"}\n\n{"text": "t\\u0000wo", "n": 2, "repo": "r"}\n'
    lines += b'{"text": 3, "n": 3, "repo": "r"}\nnot json\n{"n": 5}\n\xff\n[1]\n{"text": "last", "n": 6, "repo": "q"}'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    name = f"x.jsonl{suffix}"
    (tmp_path / name).write_bytes(pack(lines))
    source = JsonLines(path=tmp_path)
    at = [0, *(place + 1 for place, byte in enumerate(lines) if byte == ord("\n"))]  # where line n begins
    assert kept(source) == {f"{name}@{at[0]}": "one", f"{name}@{at[2]}": "t\0wo", f"{name}@{at[8]}": "last"}
    bad = {3: "bad_record", 4: "bad_record", 5: "bad_record", 6: "undecodable", 7: "bad_record"}
    assert skipped(source) == {f"{name}@{at[line]}": rule for line, rule in bad.items()}
    named = JsonLines(path=tmp_path / name, id_field="n", group_field="repo")
    assert list(kept(named)) == ["1", "2", "6"]
    assert [d.group for d in read(named) if isinstance(d, Document)] == ["r", "r", "q"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_compressed_file_is_listed_and_the_next_one_read(tmp_path, suffix):
    rng = np.random.default_rng(0)
    lines = b"".join(json.dumps({"text": rng.bytes(50).hex()}).encode() + b"\n" for _ in range(2000))
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines)[:-2000])
    (tmp_path / f"b.jsonl{suffix}").write_bytes(pack(b'{"text": "whole"}\n'))
    source = JsonLines(path=tmp_path)
    assert "whole" in kept(source).values()
    assert set(skipped(source).values()) == {"unreadable"}


def test_zstd_files_of_several_frames_are_read_to_the_end(tmp_path):
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(
        b"".join(pack(json.dumps({"text": str(n)}).encode() + b"\n") for n in range(50))
    )
    assert list(kept(JsonLines(path=tmp_path)).values()) == [str(n) for n in range(50)]


def test_a_cut_between_lines_is_noticed(tmp_path):
    """Two frames, the second one cut: nothing of its text may look like the end of the file."""
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "a.jsonl.zst").write_bytes(pack(b'{"text": "a"}\n') + pack(b'{"text": "b"}\n')[:-4])
    assert "unreadable" in skipped(JsonLines(path=tmp_path)).values()


def test_parquet(tmp_path):
    table = pa.table({"body": ["one", None, "three"], "name": ["a", "b", "c"], "repo": ["r", "r", "q"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    source = Parquet(path=tmp_path, column="body", id_column="name", group_column="repo")
    assert kept(source) == {"a": "one", "c": "three"}
    assert skipped(source) == {"x.parquet:1": "bad_record", "y.parquet": "unreadable"}
    with pytest.raises(CorpusError, match="no column 'text'; it has body"):
        read(Parquet(path=tmp_path / "x.parquet"))


@pytest.mark.parametrize("source", [TextFolder, JsonLines, Parquet])
def test_missing_and_empty_places_are_named(tmp_path, source):
    with pytest.raises(CorpusError, match="nowhere"):
        list(source(path=tmp_path / "nowhere").files())
    with pytest.raises(CorpusError, match=str(tmp_path)):
        list(source(path=tmp_path).files())


@dataclass(frozen=True)
class Own(FileSource):
    """What a user writes: two methods."""

    path: Path

    def files(self):
        yield from ((path.name, path) for path in sorted(self.path.iterdir()))

    def documents(self, piece):
        for name, path in piece.files:
            yield Document(name, path.read_text(), "own")


def test_a_source_of_ones_own_is_cut_by_size_and_number(tmp_path, monkeypatch):
    for number, size in enumerate([6, 4, 1, 30, 2, 2, 2, 2]):
        (tmp_path / str(number)).write_text("x" * size)
    monkeypatch.setattr(sources, "PIECE_BYTES", 10)
    monkeypatch.setattr(sources, "PIECE_FILES", 3)
    pieces = list(Own(tmp_path).pieces())
    assert [[name for name, _ in piece.files] for piece in pieces] == [["0", "1"], ["2"], ["3"], ["4", "5", "6"], ["7"]]
    assert [item.id for item in read(Own(tmp_path))] == [str(n) for n in range(8)]
    assert pickle.loads(pickle.dumps(pieces)) == pieces


def test_a_compressed_file_is_a_piece_by_itself(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl"):
        (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith("gz") else b"{}\n")
    pieces = JsonLines(path=tmp_path).pieces()
    assert [[name for name, _ in piece.files] for piece in pieces] == [
        ["a.jsonl", "b.jsonl"],
        ["c.jsonl.gz"],
        ["d.jsonl"],
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 40, 1000])
def test_ranges_of_bytes_share_out_the_lines(tmp_path, monkeypatch, size):
    """Whatever the border falls on: inside a line, on its newline, behind it, on an empty line, in a long line."""
    texts = ["", "a", "é" * 5, "x" * 300, "b\nc", "z" * 31, "\0"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = ("\n".join([*lines, "", "", "broken", lines[1]]) + "\n").encode() + lines[2].encode()
    (tmp_path / "x.jsonl").write_bytes(content)
    monkeypatch.setattr(sources, "MAX_BYTES", 200)
    source = JsonLines(path=tmp_path)
    whole = list(source.documents(Piece(tuple(source.files()))))
    assert [item.text for item in whole if isinstance(item, Document)] == [*texts[:3], *texts[4:], "a", "é" * 5]
    monkeypatch.setattr(sources, "RANGE_BYTES", size)
    assert len(list(source.pieces())) == max(-(-len(content) // size), 1)
    assert read(source) == whole


def test_a_long_line_takes_no_more_memory_than_the_limit(tmp_path, monkeypatch):
    """100 MB without a newline, whole and in ranges."""
    monkeypatch.setattr(sources, "MAX_BYTES", 1 << 20)
    with (tmp_path / "x.jsonl").open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'\n{"text": "next"}\n')
    tracemalloc.start()
    items = read(JsonLines(path=tmp_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(item.id, type(item)) for item in items] == [("x.jsonl@0", Skipped), ("x.jsonl@100000001", Document)]
    assert peak < 8 << 20


def _write_groups(path: Path, texts: list[str], rows: int) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="none", use_dictionary=False)


def test_row_groups_share_out_the_rows(tmp_path, monkeypatch):
    texts = [f"{number} " + "word " * (number % 7) for number in range(1000)]
    _write_groups(tmp_path / "x.parquet", texts, 90)
    source = Parquet(path=tmp_path)
    assert len(list(source.pieces())) == 1
    whole = read(source)
    monkeypatch.setattr(sources, "RANGE_BYTES", 4000)
    assert len(list(source.pieces())) > 3
    assert read(source) == whole
    assert [(item.id, item.text) for item in whole] == [(f"x.parquet:{n}", text) for n, text in enumerate(texts)]


def test_a_damaged_row_group_costs_no_other_one(tmp_path):
    texts = [f"document {number:05d}" for number in range(300)]
    _write_groups(tmp_path / "x.parquet", texts, 100)
    first = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1).column(0).data_page_offset
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[first : first + 16] = b"\xff" * 16
    (tmp_path / "x.parquet").write_bytes(content)
    source = Parquet(path=tmp_path)
    assert list(kept(source).values()) == texts[:100] + texts[200:]
    assert skipped(source) == {"x.parquet:100": "unreadable"}


def test_a_column_with_bytes_that_are_no_text(tmp_path):
    column = pa.array([b"good", b"\xff\xfe", "é\0".encode(), b""])
    pq.write_table(pa.table({"text": column, "id": ["a", "b", "c", "d"]}), tmp_path / "bytes.parquet")
    source = Parquet(path=tmp_path, id_column="id")
    assert kept(source) == {"a": "good", "c": "é\0", "d": ""}
    assert skipped(source) == {"bytes.parquet:1": "undecodable"}


def test_unreadable_strings_of_arrow_are_listed(tmp_path):
    """Arrow does not check that a string column is UTF-8."""
    column = pa.array([b"good", b"\xff"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert kept(Parquet(path=tmp_path)) == {"x.parquet:0": "good"}
    assert skipped(Parquet(path=tmp_path)) == {"x.parquet:1": "undecodable"}


@pytest.mark.parametrize(
    ("name", "ending"), [("TextFolder", "txt"), ("JsonLines", "jsonl"), ("Parquet", "parquet"), ("Arrow", "arrow")]
)
def test_an_input_error_of_the_system_is_an_unreadable_file(tmp_path, name, ending):
    """The first page of a process's memory is a file that opens and gives EIO."""
    (tmp_path / f"a.{ending}").symlink_to("/proc/self/mem")
    split = {"split": data.AtBlankLines()} if name == "TextFolder" else {}
    for fields in ({}, split):
        (lost,) = read(getattr(data, name)(path=tmp_path, **fields))
        assert lost.rule == UNREADABLE
        assert lost.id.startswith(f"a.{ending}")


NAMES = ("TextFolder", "JsonLines", "Parquet", "Arrow", "HuggingFaceDataset")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "url", ["gs://b/x", "s3://b/x", "hf://datasets/a/b", "https://h/x.jsonl", "file:///x", "az://c"]
)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_refused_in_one_sentence(name, url, kind):
    with pytest.raises(ConfigError, match=rf"^{name}\.path is '{url[:2]}.*mounted file system.*give that path$"):
        getattr(data, name)(path=kind(url))


def test_a_url_of_tfds_is_refused_in_one_sentence():
    with pytest.raises(ConfigError, match=r"^Tfds\.name_or_directory is 'gs:"):
        data.Tfds(name_or_directory="gs://tfds-data/datasets/c4/en/3.1.0")
    with pytest.raises(ConfigError, match=r"^Tfds\.data_dir is 'gs:"):
        data.Tfds(name_or_directory="c4/en", data_dir="gs://tfds-data/datasets")


@pytest.mark.parametrize("name", NAMES)
def test_a_path_may_be_a_str(tmp_path, name):
    source = getattr(data, name)(path=str(tmp_path))
    assert source == getattr(data, name)(path=tmp_path)
    assert to_json(source) == to_json(getattr(data, name)(path=tmp_path))
    with pytest.raises(CorpusError, match=str(tmp_path)):
        read(source)


def test_suffixes_of_tables_are_found_in_any_case_and_markers_are_not(tmp_path):
    (tmp_path / "_temporary").mkdir()
    for name in ("a.PARQUET", "b.parquet", ".c.parquet", "_temporary/d.parquet"):
        pq.write_table(pa.table({"text": [name]}), tmp_path / name)
    (tmp_path / "_SUCCESS").write_text("")
    assert list(kept(Parquet(path=tmp_path)).values()) == ["a.PARQUET", "b.parquet"]
