import gzip
import json
import sys
import sysconfig

import numpy as np
import pytest
import zstandard

from efftrain.data import sources
from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import JsonLines, Parquet, PythonFiles, TextFolder
from efftrain.data.tfds_source import Tfds
from efftrain.errors import CorpusError


def kept(source) -> dict[str, str]:
    return {item.id: item.text for item in source.documents() if isinstance(item, Document)}


def skipped(source) -> dict[str, str]:
    return {item.id: item.rule for item in source.documents() if isinstance(item, Skipped)}


@pytest.fixture
def python_folders(tmp_path, monkeypatch):
    library, installed = tmp_path / "lib", tmp_path / "lib" / "site-packages"
    files = {
        library / "json" / "decoder.py": b"x = 1\r\n",
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
    monkeypatch.setattr(sources.site, "getsitepackages", lambda: [str(installed)])


@pytest.mark.usefixtures("python_folders")
def test_python_files_are_read_once_with_their_own_encoding():
    assert kept(PythonFiles()) == {
        "stdlib/argparse.py": "y = 2\n",
        "stdlib/json/decoder.py": "x = 1\r\n",
        "site-packages/numpy/core.py": "# -*- coding: latin-1 -*-\n# \u00e9\n",
    }
    assert skipped(PythonFiles()) == {
        "site-packages/numpy/bad.py": "undecodable",
        "site-packages/numpy/unknown.py": "undecodable",
    }
    packages = {item.id: item.package for item in PythonFiles().documents() if isinstance(item, Document)}
    assert set(packages.values()) == {"argparse", "json", "numpy"}


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
    source = TextFolder(path=tmp_path, package_by_folder=True)
    assert kept(source) == {"a/one.txt": "naïve\r\n"}
    assert skipped(source) == {"two.txt": "undecodable", "gone.txt": "unreadable"}
    assert [d.package for d in source.documents() if isinstance(d, Document)] == ["a"]


def test_a_file_too_large_for_memory_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "y" * 300}) + "\n" + json.dumps({"text": "z"}) + "\n")
    assert skipped(TextFolder(path=tmp_path)) == {"a.txt": "too_large"}
    assert skipped(JsonLines(path=tmp_path / "b.jsonl")) == {"b.jsonl:1": "too_large"}
    assert kept(JsonLines(path=tmp_path / "b.jsonl")) == {"b.jsonl:2": "z"}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_in_every_compression(tmp_path, suffix):
    lines = b'{"text": "one", "n": 1, "repo": "r"}\n\n{"text": "t\\u0000wo", "n": 2, "repo": "r"}\n'
    lines += b'{"text": 3, "n": 3, "repo": "r"}\nnot json\n{"n": 5}\n\xff\n[1]\n{"text": "last", "n": 6, "repo": "q"}'
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    name = f"x.jsonl{suffix}"
    (tmp_path / name).write_bytes(pack(lines))
    source = JsonLines(path=tmp_path)
    assert kept(source) == {f"{name}:1": "one", f"{name}:3": "t\0wo", f"{name}:9": "last"}
    bad = {4: "bad_record", 5: "bad_record", 6: "bad_record", 7: "undecodable", 8: "bad_record"}
    assert skipped(source) == {f"{name}:{line}": rule for line, rule in bad.items()}
    named = JsonLines(path=tmp_path / name, id_field="n", package_field="repo")
    assert list(kept(named)) == ["1", "2", "6"]
    assert [d.package for d in named.documents() if isinstance(d, Document)] == ["r", "r", "q"]


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
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"body": ["one", None, "three"], "name": ["a", "b", "c"], "repo": ["r", "r", "q"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    source = Parquet(path=tmp_path, column="body", id_column="name", package_column="repo")
    assert kept(source) == {"a": "one", "c": "three"}
    assert skipped(source) == {"x.parquet:1": "bad_record", "y.parquet:0": "unreadable"}
    with pytest.raises(CorpusError, match="no column 'text'; it has body"):
        list(Parquet(path=tmp_path / "x.parquet").documents())


def test_tfds_reads_the_corpus_that_efftrain_wrote(corpus):
    source = Tfds(name_or_directory=str(corpus.path / "text"), split="train", text_feature="text")
    assert list(kept(source).values()) == [d.text for d in corpus.documents("train")]
    assert any(name.startswith("text-train") for name, _ in source.files())


def test_tfds_says_how_to_mend_it(corpus, tmp_path):
    text = str(corpus.path / "text")
    with pytest.raises(CorpusError, match="4 text features"):
        list(Tfds(name_or_directory=text).documents())
    with pytest.raises(CorpusError, match="no feature 'body'"):
        list(Tfds(name_or_directory=text, text_feature="body").documents())
    with pytest.raises(CorpusError, match="no split 'dev'; it has train, validation, test"):
        list(Tfds(name_or_directory=text, text_feature="text", split="dev").documents())
    with pytest.raises(CorpusError, match="tfds build lm1b --file_format=array_record"):
        list(Tfds(name_or_directory="lm1b", data_dir=str(tmp_path)).files())
    with pytest.raises(CorpusError, match="knows no dataset 'no_such_set'"):
        list(Tfds(name_or_directory="no_such_set", data_dir=str(tmp_path)).files())
    with pytest.raises(CorpusError, match="not a TFDS dataset"):
        list(Tfds(name_or_directory=str(tmp_path)).files())


@pytest.mark.parametrize("source", [TextFolder, JsonLines, Parquet])
def test_missing_and_empty_places_are_named(tmp_path, source):
    with pytest.raises(CorpusError, match="nowhere"):
        list(source(path=tmp_path / "nowhere").files())
    with pytest.raises(CorpusError, match=str(tmp_path)):
        list(source(path=tmp_path).files())
