"""Files of text: one file a document, and long files that are cut into documents."""

import gzip
import os
import socket
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from efftrain import data
from efftrain.config import from_json, to_json
from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.cutting import AtBlankLines, AtPattern
from efftrain.data.sources.text import PythonFiles, TextFolder
from efftrain.errors import ConfigError, CorpusError


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def texts(source) -> dict[str, str]:
    return {item.id: item.text for item in read(source)}


WIKI = "preamble\n\n= One =\n\nfirst\nlines\n\n== Part ==\n\nmore\n= Two =\nsecond\n"


def test_a_single_file_is_a_source(tmp_path):
    """Whatever its name, and as a str."""
    (tmp_path / "book.md").write_text(WIKI)
    assert texts(TextFolder(path=str(tmp_path / "book.md"))) == {"book.md": WIKI}


def test_a_document_begins_at_each_line_with_the_pattern(tmp_path):
    (tmp_path / "wiki.txt").write_bytes(b"\xef\xbb\xbf" + WIKI.replace("\n", "\r\n").encode())
    source = TextFolder(path=tmp_path / "wiki.txt", split=AtPattern(pattern=r"^= [^=].* =$"))
    assert texts(source) == {
        "wiki.txt@0": "preamble",
        "wiki.txt@15": "= One =\n\nfirst\nlines\n\n== Part ==\n\nmore",
        "wiki.txt@62": "= Two =\nsecond",
    }
    assert list(texts(replace(source, split=AtPattern(pattern=""))).values()) == WIKI.split("\n")[:1] + [
        line for line in WIKI.split("\n")[1:] if line
    ]


def test_a_document_begins_after_a_blank_line_once_the_one_before_is_long_enough(tmp_path):
    paragraphs = ["a" * 10, "b" * 10, "c" * 30, "d", "e" * 5]
    (tmp_path / "x.txt").write_text("\n\n" + "\n \t\n\n".join(paragraphs) + "\n\n\n")
    for min_bytes, expected in [(0, 5), (1, 5), (20, 3), (1000, 1)]:
        found = list(texts(TextFolder(path=tmp_path, split=AtBlankLines(min_bytes=min_bytes))).values())
        assert len(found) == expected
        assert "".join("".join(found).split()) == "".join(paragraphs)
        assert all(text == text.strip() for text in found)
    assert len(found[0]) > 50


def test_a_document_that_grows_too_large_is_cut_at_a_line_end_or_between_characters(tmp_path):
    lines = ["x" * 30 + "\n"] * 10
    (tmp_path / "lines.txt").write_text("".join(lines))
    found = texts(TextFolder(path=tmp_path / "lines.txt", split=AtBlankLines(min_bytes=0, max_bytes=100)))
    assert found == {f"lines.txt@{n * 93}": "".join(lines[n * 3 : n * 3 + 3]).strip() for n in range(4)}
    long = "é€\U0001f600" * 100
    (tmp_path / "long.txt").write_text("short\n" + long + "\nend\n")
    found = texts(TextFolder(path=tmp_path / "long.txt", split=AtPattern(pattern="^end", max_bytes=50)))
    assert "".join(found.values()) == "short" + long + "end"
    assert all(46 < len(text.encode()) <= 50 for text in list(found.values())[1:-2])


@pytest.mark.parametrize("at", [AtBlankLines(min_bytes=20, max_bytes=60), AtPattern(pattern=r"^\w+é", max_bytes=64)])
def test_ranges_share_out_the_documents(tmp_path, monkeypatch, at):
    """Random text of short and long lines, blank lines, wide characters and bytes that are no text."""
    rng = np.random.default_rng(0)
    parts = ["\n", "\n\n", " ", "\r\n", "word", "é", "€\U0001f600", "x" * 70, "\n  \n"]
    content = "".join(rng.choice(parts, 3000)).encode()
    content = content[:5000] + b"\xff\xf0\x80\n\n" + content[5000:] + b"\xe2\x82"
    (tmp_path / "x.txt").write_bytes(content)
    source = TextFolder(path=tmp_path, split=at)
    whole = read(source)
    assert len(whole) > 100
    assert [item.rule for item in whole if isinstance(item, Skipped)].count("undecodable") == 2
    read_text = "".join(item.text for item in whole if isinstance(item, Document))
    assert read_text.count("x" * 60) > 0
    for size in (1, 7, 50, 333, 4096, 100_000):
        monkeypatch.setattr(sources, "RANGE_BYTES", size)
        pieces = list(source.pieces())
        assert len(pieces) == 1 if size > len(content) else len(pieces) > len(content) // max(size, 64) // 2
        assert read(source) == whole, size


def test_every_character_is_in_one_document(tmp_path):
    rng = np.random.default_rng(1)
    content = "".join(rng.choice(["a b\n", "\n", "é" * 40, "12\n"], 2000))
    (tmp_path / "x.txt").write_text(content)
    for at in (AtBlankLines(min_bytes=9, max_bytes=50), AtPattern(pattern="2", max_bytes=33)):
        found = "".join(texts(TextFolder(path=tmp_path, split=at)).values())
        assert "".join(found.split()) == "".join(content.split())


def test_packed_files_and_folders_are_cut_too(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt.gz").write_bytes(gzip.compress(b"one\n\ntwo\n"))
    (tmp_path / "utf16.TXT").write_bytes("drei\n\nvier\n".encode("utf-16"))
    source = TextFolder(path=tmp_path, group_by_folder=True, split=AtBlankLines(min_bytes=1))
    items = read(source)
    assert [(item.id, item.text, item.group) for item in items] == [
        ("utf16.TXT@0", "drei", "utf16.TXT@0"),
        ("utf16.TXT@6", "vier", "utf16.TXT@6"),
        ("a/one.txt.gz@0", "one", "a"),
        ("a/one.txt.gz@5", "two", "a"),
    ]


def test_a_cut_packed_text_keeps_what_was_read(tmp_path):
    rng = np.random.default_rng(0)
    packed = gzip.compress(b"".join(rng.bytes(40).hex().encode() + b"\n\n" for _ in range(5000)))
    (tmp_path / "a.txt.gz").write_bytes(packed[:-1000])
    *before, lost = read(TextFolder(path=tmp_path, split=AtBlankLines(min_bytes=1)))
    assert len(before) > 4000
    assert (lost.rule, isinstance(before[-1], Document)) == (UNREADABLE, True)
    (lost,) = read(TextFolder(path=tmp_path))
    assert lost.rule == UNREADABLE


def test_a_long_file_takes_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RANGE_BYTES", 16 << 20)
    with (tmp_path / "x.txt").open("wb") as file:
        for _ in range(1000):
            file.write(b"word " * 8000 + b"\n")
    source = TextFolder(path=tmp_path, split=AtBlankLines(max_bytes=1 << 20))
    tracemalloc.start()
    n_bytes = sum(len(item.text) for piece in source.pieces() for item in source.documents(piece))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_bytes > 39_990_000
    assert peak < 12 << 20


def test_a_file_that_is_too_large_says_how_to_cut_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 60 + "\n\n" + "y" * 60)
    (skipped,) = read(TextFolder(path=tmp_path))
    assert (skipped.rule, skipped.n_bytes) == ("too_large", 122)
    assert "split=AtBlankLines()" in skipped.detail
    assert len(skipped.detail) < 200  # the evidence of removals keeps 200 characters
    assert len(read(TextFolder(path=tmp_path, split=AtBlankLines(min_bytes=1)))) == 2


def test_one_text_file_makes_a_corpus(tmp_path, config_for):
    """The commonest first try: a str, one file, prose."""
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(500)]
    paragraphs = [" ".join(rng.choice(words, 60)) for _ in range(300)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs))
    source = data.TextFolder(path=str(tmp_path / "book.txt"), split=data.AtBlankLines(min_bytes=1000))
    corpus = data.build(config_for(tmp_path, sources=(source,)), tmp_path / "out")
    assert all(corpus.splits[split]["documents"] > 10 for split in ("train", "validation", "test"))
    found = {document.id: document.text for split in corpus.splits for document in corpus.documents(split)}
    ordered = [found[id] for id in sorted(found, key=lambda id: int(id.partition("@")[2]))]
    assert "\n\n".join(ordered) == "\n\n".join(paragraphs)


def test_a_split_can_be_written_to_a_manifest():
    for at in (AtBlankLines(min_bytes=3), AtPattern(pattern="^=")):
        source = data.TextFolder(path=Path("x"), split=at)
        assert from_json(to_json(source)) == source


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (AtPattern, {"pattern": "("}, r"AtPattern\.pattern '\(' is not a valid regular expression"),
        (AtPattern, {"pattern": "", "max_bytes": 3}, r"AtPattern\.max_bytes is 3; give 4 to"),
        (AtBlankLines, {"max_bytes": 1 << 30}, r"AtBlankLines\.max_bytes"),
        (AtBlankLines, {"min_bytes": 20, "max_bytes": 10}, r"AtBlankLines\.min_bytes is 20"),
    ],
)
def test_an_impossible_split_is_refused(kind, fields, words):
    with pytest.raises(ConfigError, match=words):
        kind(**fields)


def test_pipes_sockets_links_in_a_circle_hidden_files_and_markers_are_left_out(tmp_path):
    """A pipe that is opened blocks until somebody writes into it."""
    folder = tmp_path / "x"
    (folder / ".git").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", "._a.txt", ".git/b.txt", "_drafts.txt"):
        (folder / name).write_text(name)
    os.mkfifo(folder / "pipe.txt")
    (folder / "null.txt").symlink_to("/dev/null")
    (folder / "circle").symlink_to(folder, target_is_directory=True)
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s.txt"))
        items = read(TextFolder(path=folder))
    assert {item.id: getattr(item, "rule", None) for item in items} == {
        "_drafts.txt": None,
        "a.txt": None,
        "itself.txt": UNREADABLE,
    }
    assert set(texts(TextFolder(path=folder, pattern=".*.txt"))) == {".hidden.txt", "._a.txt"}
    with pytest.raises(CorpusError, match="neither a file nor a folder"):
        read(TextFolder(path=folder / "pipe.txt"))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path):
    """Here because it vanished while the files were listed."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    files = TextFolder(path=tmp_path).files()
    assert next(files)[0] == "a/x.txt"
    (tmp_path / "b" / "x.txt").unlink()
    (tmp_path / "b").rmdir()
    with pytest.raises(CorpusError, match=r"/b cannot be listed \(No such file"):
        list(files)


def test_the_folder_in_which_one_is_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path / "essays")
    assert [item.source for item in read(TextFolder(path="."))] == ["essays"]


def test_sources_say_what_kind_of_text_they_hold():
    kinds = {name: getattr(data, name).kind for name in ("PythonFiles", "TextFolder", "JsonLines", "Parquet", "Tfds")}
    assert kinds.pop("PythonFiles") == PythonFiles.kind == "code"
    assert set(kinds.values()) == {"text"}
    assert "kind" not in to_json(PythonFiles())
