"""Tables: Parquet, Arrow's two formats and what datasets wrote, with metadata and files that lack a column."""

import datetime
import decimal
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.arrow import Arrow
from efftrain.data.sources.huggingface import HuggingFaceDataset
from efftrain.data.sources.parquet import Parquet
from efftrain.errors import CorpusError


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def write_stream(table: pa.Table, path: Path, rows: int = 1000) -> None:
    with path.open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)


def write_file(table: pa.Table, path: Path, rows: int = 1000) -> None:
    with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table, max_chunksize=rows)


def write_feather(table: pa.Table, path: Path, rows: int = 1000) -> None:
    pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=rows)


def write_parquet(table: pa.Table, path: Path, rows: int = 1000) -> None:
    pq.write_table(table, path, row_group_size=rows)


def save(table: pa.Table, folder: Path) -> None:
    folder.mkdir()
    write_stream(table, folder / "data.arrow")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


FORMATS = {
    "parquet": (Parquet, "x.parquet", write_parquet),
    "stream": (Arrow, "x.arrow", write_stream),
    "file": (Arrow, "x.ARROW", write_file),
    "feather": (Arrow, "x.feather", write_feather),
}


@pytest.mark.parametrize("kind", [*FORMATS, "saved"])
def test_scalar_columns_become_metadata(tmp_path, kind):
    moment = datetime.datetime(2024, 2, 3, 4, 5, 6, 789)
    columns = {
        "text": ["one", "two"],
        "url": ["https://a.example/", None],
        "score": pa.array([0.5, float("nan")], pa.float32()),
        "n": pa.array([3, None], pa.int16()),
        "ok": [True, False],
        "kind": pa.array(["a", "b"]).dictionary_encode(),
        "day": [datetime.date(2024, 2, 3), None],
        "naive": pa.array([moment, None], pa.timestamp("us")),
        "nanoseconds": pa.array([1_706_933_106_000_000_001, None], pa.timestamp("ns", "Europe/Berlin")),
        "odd zone": pa.array([0, None], pa.timestamp("s", "Nowhere/Atall")),
        "year 300,000": pa.array([9_400_000_000_000, None], pa.timestamp("s")),
        "clock": pa.array([1_000_000_001, None], pa.time64("ns")),
        "price": [decimal.Decimal("1.10"), None],
        "long": ["x" * 2001, "x"],
        "bytes": [b"no", None],
        "list": [["no"], []],
        "struct": [{"a": 1}, None],
        "span": pa.array([5, None], pa.duration("s")),
        "broken": pa.array([b"\xff", b"fine"]).view(pa.string()),
        "null": pa.nulls(2),
        "package": ["p", "q"],
        "id": ["i", None],
    }
    table = pa.table(columns)
    if kind == "saved":
        source = HuggingFaceDataset(path=tmp_path / "set")
        save(table, source.path)
    else:
        cls, name, write = FORMATS[kind]
        write(table, tmp_path / name)
        source = cls(path=tmp_path)
    one, two = read(source)
    assert one.meta == {
        "url": "https://a.example/",
        "score": 0.5,
        "n": 3,
        "ok": True,
        "kind": "a",
        "day": "2024-02-03",
        "naive": "2024-02-03T04:05:06.000789",
        "nanoseconds": "2024-02-03T04:05:06+00:00",
        "odd zone": "1970-01-01T00:00:00+00:00",
        "clock": "00:00:01",
        "price": "1.10",
        "id": "i",
    }
    assert two.meta == {"ok": False, "kind": "b", "long": "x", "broken": "fine"}
    assert (one.group, two.group) == (one.id, two.id)
    json.dumps([one.meta, two.meta], allow_nan=False)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_null_id_is_the_row_and_a_null_package_the_document_itself(tmp_path, kind):
    cls, name, write = FORMATS[kind]
    write(pa.table({"text": ["a", "b", "c"], "key": ["k", None, ""], "repo": ["r", None, ""]}), tmp_path / name)
    items = read(cls(path=tmp_path, id_column="key", group_column="repo"))
    assert [item.id for item in items] == ["k", f"{name}:1", f"{name}:2"]
    assert [item.group for item in items] == ["r", f"{name}:1", f"{name}:2"]
    assert [item.meta for item in items] == [{"group": "r"}, {}, {}]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_column_inside_of_a_struct(tmp_path, kind):
    cls, name, write = FORMATS[kind]
    rows = [{"data": {"text": "a", "key": {"id": "k"}}, "n": 1}, {"data": None, "n": 2}]
    write(pa.Table.from_pylist(rows), tmp_path / name)
    one, two = read(cls(path=tmp_path, column="data.text", id_column="data.key.id"))
    assert (one.id, one.text, one.meta) == ("k", "a", {"n": 1})
    assert (two.id, two.rule) == (f"{name}:1", "bad_record")
    with pytest.raises(CorpusError, match=r"no column 'data\.body'; it has data, n"):
        read(cls(path=tmp_path, column="data.body"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_without_the_column_and_a_junk_file_are_treated_alike(tmp_path, kind):
    cls, name, write = FORMATS[kind]
    ending = name[1:]
    write(pa.table({"text": ["good"], "key": ["k"]}), tmp_path / f"c{ending}")
    write(pa.table({"body": ["other"], "n": [1]}), tmp_path / f"a{ending}")
    (tmp_path / f"b{ending}").write_bytes(b"junk that is no table at all")
    (tmp_path / f"d{ending}").write_bytes(b"")
    write(pa.table({"text": ["no key"]}), tmp_path / f"e{ending}")
    items = read(cls(path=tmp_path, id_column="key"))
    assert [item.id for item in items if isinstance(item, Document)] == ["k", f"e{ending}:0"]
    lost = {item.id[0]: item for item in items if isinstance(item, Skipped)}
    assert {key: item.rule for key, item in lost.items()} == dict.fromkeys("abd", UNREADABLE)
    assert "no column 'text'; the columns are: body, n" in lost["a"].detail
    assert [lost[key].n_bytes for key in "abd"] == [(tmp_path / f"{key}{ending}").stat().st_size for key in "abd"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_column_that_no_file_has_is_an_error_before_anything_is_read(tmp_path, kind):
    cls, name, write = FORMATS[kind]
    for first in "ab":
        write(pa.table({"body": ["other"], "key": ["k"]}), tmp_path / f"{first}{name[1:]}")
    for wrong in ({"column": "text"}, {"column": "body", "id_column": "id"}, {"column": "body", "group_column": "x"}):
        with pytest.raises(CorpusError, match=r"/ax?\.\w+ has no column '\w+'; it has body, key"):
            list(cls(path=tmp_path, **wrong).pieces())


@pytest.mark.parametrize("kind", FORMATS)
def test_ranges_share_out_the_rows(tmp_path, monkeypatch, kind):
    cls, name, write = FORMATS[kind]
    texts = [f"{number} " + "word " * (number % 7) for number in range(1000)]
    write(pa.table({"text": texts, "n": range(1000)}), tmp_path / name, 50)
    whole = read(cls(path=tmp_path))
    monkeypatch.setattr(sources, "RANGE_BYTES", 4000)
    assert len(list(cls(path=tmp_path).pieces())) > 3
    assert read(cls(path=tmp_path)) == whole
    assert [(item.id, item.text, item.meta["n"]) for item in whole] == [
        (f"{name}:{n}", text, n) for n, text in enumerate(texts)
    ]


@pytest.mark.parametrize("cut", [1, 8, 100])
def test_what_comes_before_the_cut_of_a_stream_is_read(tmp_path, cut):
    write_stream(pa.table({"text": [f"text {n}" for n in range(100)]}), tmp_path / "x.arrow", rows=10)
    content = (tmp_path / "x.arrow").read_bytes()
    (tmp_path / "x.arrow").write_bytes(content[:-cut])
    *before, lost = read(Arrow(path=tmp_path))
    n_read = 90 if cut == 100 else 100
    assert [item.text for item in before] == [f"text {n}" for n in range(n_read)]
    assert (lost.rule, lost.id) == (UNREADABLE, f"x.arrow:{n_read}")
    assert f"from row {n_read} on" in lost.detail


def test_a_damaged_row_group_says_how_much_is_lost(tmp_path):
    table = pa.table({"text": [f"document {number:05d}" for number in range(300)]})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=100, compression="none", use_dictionary=False)
    group = pq.ParquetFile(tmp_path / "x.parquet").metadata.row_group(1)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    first = group.column(0).data_page_offset
    content[first : first + 16] = b"\xff" * 16
    (tmp_path / "x.parquet").write_bytes(content)
    (lost,) = [item for item in read(Parquet(path=tmp_path)) if isinstance(item, Skipped)]
    assert (lost.rule, lost.n_bytes) == (UNREADABLE, group.total_byte_size)


def test_the_cache_of_datasets_is_read_with_arrow(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    for number in range(2):
        write_stream(pa.table({"text": [f"t{number}"]}), tmp_path / f"own-train-0000{number}-of-00002.arrow")
    assert [item.text for item in read(Arrow(path=tmp_path))] == ["t0", "t1"]
    with pytest.raises(CorpusError, match=r"read a folder of \.arrow files with Arrow"):
        read(HuggingFaceDataset(path=tmp_path))
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(CorpusError, match="damaged"):
        read(HuggingFaceDataset(path=tmp_path))
