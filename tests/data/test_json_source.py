"""JSON lines and arrays: fields, metadata, and what is wrong with a record."""

import bz2
import gzip
import json
import lzma
import tracemalloc

import numpy as np
import pytest
import zstandard

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.json import JsonLines


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def write(path, rows) -> JsonLines:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonLines(path=path)


def test_every_name_of_json_lines_is_found_in_a_folder(tmp_path):
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    (tmp_path / "deep").mkdir()
    names = [f"deep/a{kind}{end}" for kind in (".jsonl", ".ndjson", ".json") for end in pack] + ["B.JSONL", "c.Json.GZ"]
    for name in names:
        end = "." + name.rpartition(".")[2].lower()
        (tmp_path / name).write_bytes(pack.get(end, bytes)(json.dumps({"text": name}).encode()))
    (tmp_path / ".jsonl").write_text("hidden")
    (tmp_path / "_SUCCESS").write_text("")
    (tmp_path / "_delta_log").mkdir()
    (tmp_path / "_delta_log" / "000.json").write_text('{"text": "no"}')
    assert sorted(item.text for item in read(JsonLines(path=tmp_path))) == sorted(names)


def test_the_other_fields_become_metadata(tmp_path):
    row = {
        "text": "t",
        "url": "https://a.example/é",
        "language_score": 0.93,
        "date": "2024-01-01T00:00:00Z",
        "n": 3,
        "ok": False,
        "none": None,
        "list": [1],
        "nested": {"a": 1},
        "long": "x" * 2001,
        "edge": "x" * 2000,
        "infinite": float("inf"),
        "package": "not asked for",
        "id": "i",
        "repo": "r",
    }
    kept = {"url", "language_score", "date", "n", "ok", "edge"}
    (item,) = read(write(tmp_path / "a.jsonl", [row]))
    assert item.meta == {name: row[name] for name in (*kept, "id", "repo")}
    assert item.group == item.id == "a.jsonl@0"
    (item,) = read(JsonLines(path=tmp_path, id_field="id", group_field="repo"))
    assert item.meta == {name: row[name] for name in kept} | {"group": "r"}
    (item,) = read(JsonLines(path=tmp_path, group_field="package"))
    assert item.group == "not asked for"
    assert json.loads(json.dumps(item.meta, allow_nan=False)) == item.meta


@pytest.mark.parametrize("missing", [{}, {"id": None, "repo": None}, {"id": "", "repo": ""}])
def test_a_missing_id_is_the_place_and_a_missing_package_the_document_itself(tmp_path, missing):
    write(tmp_path / "a.jsonl", [{"text": "a"} | missing, {"text": "b", "id": 0, "repo": 0}, {"text": "c"} | missing])
    items = read(JsonLines(path=tmp_path, id_field="id", group_field="repo"))
    places = [item.id for item in read(JsonLines(path=tmp_path))]
    assert [item.id for item in items] == [places[0], "0", places[2]]
    assert [item.group for item in items] == [places[0], "0", places[2]]
    assert all("None" not in (item.id, item.group) for item in items)


def test_a_path_with_dots_finds_a_field_inside(tmp_path):
    rows = [
        {"data": {"text": "inside", "key": 7}, "meta": {"repo": {"name": "r"}}},
        {"data.text": "its own name", "data": {"text": "no"}},
        {"data": "no object"},
    ]
    write(tmp_path / "a.jsonl", rows)
    source = JsonLines(path=tmp_path, text_field="data.text", id_field="data.key", group_field="meta.repo.name")
    one, two, bad = read(source)
    assert (one.text, one.id, one.group, two.text) == ("inside", "7", "r", "its own name")
    assert bad.detail == "there is no field 'data.text'; the fields are: data"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"body": "a", "url": "b", "data": {}}', "there is no field 'text'; the fields are: body, url, data"),
        (b"{}", "there is no field 'text'; the fields are: none"),
        (b'{"text": null, "n": 1}', "the field 'text' is null, not a string; the fields are: text, n"),
        (b'{"text": ["a"]}', "the field 'text' is a list, not a string"),
        (b'"a"', "expected an object with a field 'text', found a string"),
        (b"17", "found a number"),
        (b'{"text": "broken', "it is not JSON (Invalid control character"),
        (b"plain words", "begins with b'plain words'"),
        (b"[" * 100_000, "recursion"),
        (b'{"text": "a\xff"}', "invalid start byte"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_costs_no_other(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, bad, after = read(JsonLines(path=tmp_path))
    assert (before.text, after.text) == ("before", "after")
    assert words in bad.detail[:200]  # as much as the table of what was removed shows
    assert (bad.rule, bad.n_bytes) == ("undecodable" if "byte" in words else "bad_record", len(line) + 1)


OBJECTS = [
    {"text": 'quotes " and \\ and {[', "n": 1},
    {"text": "é]}", "list": [{"text": "no"}, []], "n": 2},
    {"text": "", "n": 3},
]


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("array", [True, False])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_an_array_and_objects_over_several_lines_are_read(tmp_path, monkeypatch, indent, array, chunk):
    monkeypatch.setattr("efftrain.data.sources.json._CHUNK", chunk)
    content = json.dumps(OBJECTS, indent=indent)
    if not array:
        content = "\n".join(json.dumps(item, indent=indent) for item in OBJECTS)
    (tmp_path / "a.json").write_text(("\ufeff" if chunk == 3 else "") + content)
    items = read(JsonLines(path=tmp_path))
    assert [(item.text, item.meta) for item in items] == [(o["text"], {"n": o["n"]}) for o in OBJECTS]
    raw = (tmp_path / "a.json").read_bytes()
    for item in items:  # where it says that the object begins
        place = int(item.id.partition("@")[2])
        assert json.JSONDecoder().raw_decode(raw[place:].decode().lstrip("\ufeff"))[0]["n"] == item.meta["n"]


@pytest.mark.parametrize("content", ["[]", "[ ]\n", "", "\n"])
def test_an_array_without_objects_is_empty(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert read(JsonLines(path=tmp_path)) == []


def test_what_is_no_object_in_an_array_is_a_bad_record(tmp_path):
    (tmp_path / "a.json").write_text(
        '["a, {b}", 3,\n {"text": "c"}, null, {"text" 4}, [{"text": "d"}], {"text": "e"}, 5]'
    )
    items = read(JsonLines(path=tmp_path))
    assert [item.text for item in items if isinstance(item, Document)] == ["c", "d", "e"]
    assert [item.rule for item in items if isinstance(item, Skipped)] == ["bad_record"] * 4


def test_a_cut_array_is_an_unreadable_file(tmp_path):
    content = json.dumps(OBJECTS)
    for size in range(1, len(content)):
        (tmp_path / "a.json").write_text(content[:size])
        *_, lost = read(JsonLines(path=tmp_path))
        assert (getattr(lost, "rule", None), "truncated" in lost.detail) == (UNREADABLE, True), size


def test_an_array_larger_than_a_range_is_one_piece_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RANGE_BYTES", 1000)
    monkeypatch.setattr(sources, "MAX_BYTES", 100_000)
    with (tmp_path / "a.json").open("w") as file:
        file.write("[\n")
        for number in range(2000):
            file.write(json.dumps({"text": "x" * 10_000 if number != 7 else "y" * 3_000_000, "n": number}) + ",\n")
        file.write('{"text": "last", "n": 2000}]')
    source = JsonLines(path=tmp_path)
    assert len(list(source.pieces())) == 1
    tracemalloc.start()
    numbers = [item.meta["n"] if isinstance(item, Document) else item.rule for item in read(source)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert numbers == [*range(7), "too_large", *range(8, 2001)]
    assert peak < 30 << 20  # of which the documents are 20


def test_a_file_of_lines_is_shared_out_as_before(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    source = write(tmp_path / "a.json", [{"text": "w" * int(rng.integers(90)), "url": "u"} for _ in range(200)])
    whole = read(source)
    monkeypatch.setattr(sources, "RANGE_BYTES", 500)
    assert len(list(source.pieces())) > 10
    assert read(source) == whole
    assert len(whole) == 200
