import json
from pathlib import Path

import pyarrow as pa
import pytest

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import base as sources
from efftrain.data.sources.huggingface import HuggingFaceDataset
from efftrain.errors import CorpusError


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def save(folder: Path, shards: list[list[dict]], rows: int = 1000) -> Path:
    """The layout of datasets 5.2's ``save_to_disk``: Arrow streams, ``state.json`` and ``dataset_info.json``."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(shard)
        with (folder / name).open("wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=rows)
    state = {"_data_files": [{"filename": name} for name in names], "_format_type": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text('{"features": {"text": {"dtype": "string", "_type": "Value"}}}')
    return folder


def rows(n: int, first: int = 0) -> list[dict]:
    return [{"text": f"naïve {i}\0", "key": i, "repo": f"r{i % 3}"} for i in range(first, first + n)]


def test_rows_of_all_files_in_their_order(tmp_path):
    folder = save(tmp_path / "set", [rows(5), [*rows(2, 5), {"text": None, "key": 7, "repo": ""}]])
    items = read(HuggingFaceDataset(path=folder, id_column="key", group_column="repo"))
    assert [(item.id, item.text, item.group) for item in items[:-1]] == [
        (str(i), f"naïve {i}\0", f"r{i % 3}") for i in range(7)
    ]
    assert (items[-1].rule, items[-1].id) == ("bad_record", "data-00001-of-00002.arrow:2")
    assert [item.id for item in read(HuggingFaceDataset(path=folder))][4:6] == [
        "data-00000-of-00002.arrow:4",
        "data-00001-of-00002.arrow:0",
    ]


def test_record_batches_share_out_the_rows(tmp_path, monkeypatch):
    source = HuggingFaceDataset(path=save(tmp_path / "set", [rows(700), rows(300, 700)], rows=50))
    whole = read(source)
    assert len(list(source.pieces())) == 1
    monkeypatch.setattr(sources, "RANGE_BYTES", 5000)
    assert len(list(source.pieces())) > 4
    assert read(source) == whole
    assert [item.text for item in whole] == [row["text"] for row in rows(1000)]


@pytest.mark.parametrize("cut", ["between batches", "in a batch", "not arrow", "missing"])
def test_a_cut_file_is_noticed_and_the_next_one_read(tmp_path, cut):
    folder = save(tmp_path / "set", [rows(100), rows(1, 100)], rows=50)
    path = folder / "data-00000-of-00002.arrow"
    content = path.read_bytes()
    path.write_bytes({"between batches": content[:-8], "in a batch": content[:-300]}.get(cut, b"no"))
    if cut == "missing":
        path.unlink()
    *_, damage, after = read(HuggingFaceDataset(path=folder))
    assert damage.rule == "unreadable"
    assert damage.id.startswith(path.name)
    assert after.text == "naïve 100\0"


def test_splits_are_chosen_by_name(tmp_path):
    save(tmp_path / "sets" / "train", [rows(3)])
    save(tmp_path / "sets" / "test", [rows(1, 9)])
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(read(HuggingFaceDataset(path=tmp_path / "sets"))) == 3
    assert [item.text for item in read(HuggingFaceDataset(path=tmp_path / "sets", split="test"))] == ["naïve 9\0"]
    with pytest.raises(CorpusError, match="no split 'dev'; it has train, test"):
        list(HuggingFaceDataset(path=tmp_path / "sets", split="dev").files())


def test_what_is_no_such_folder_is_said(tmp_path):
    with pytest.raises(CorpusError, match=r"nowhere.*save_to_disk"):
        list(HuggingFaceDataset(path=tmp_path / "nowhere").files())
    folder = save(tmp_path / "set", [rows(1)])
    with pytest.raises(CorpusError, match="no column 'body'; it has text, key, repo"):
        read(HuggingFaceDataset(path=folder, column="body"))
    (folder / "state.json").write_text('{"_data_files": []}')
    with pytest.raises(CorpusError, match="no rows"):
        list(HuggingFaceDataset(path=folder).files())
