import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import dataset_info, naming

from efftrain.data.documents import Document, Skipped
from efftrain.data.sources import tfds as tfds_source
from efftrain.data.sources.tfds import Tfds
from efftrain.data.storage.shards import ShardWriter, write_metadata
from efftrain.errors import CorpusError

FEATURES = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)})


def read(source) -> list[Document | Skipped]:
    return [item for piece in source.pieces() for item in source.documents(piece)]


def tfrecord(texts: list[bytes]) -> bytes:
    """The framing that TensorFlow writes: length, checksum, data, checksum (which the reader does not look at)."""
    records = [FEATURES.serialize_example({"text": text, "n": number}) for number, text in enumerate(texts)]
    return b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records)


def prepare(folder: Path, name: str, shards: list[list[bytes]], version: str = "1.0.0") -> Path:
    """A folder as ``tfds build`` leaves it, in its default format."""
    folder.mkdir(parents=True)
    template = naming.ShardedFileTemplate(data_dir=folder, dataset_name=name, split="train", filetype_suffix="tfrecord")
    for number, texts in enumerate(shards):
        (folder / f"{name}-train.tfrecord-{number:05d}-of-{len(shards):05d}").write_bytes(tfrecord(texts))
    identity = dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(version), data_dir=str(folder), module_name="tests"
    )
    info = dataset_info.DatasetInfo(builder=identity, features=FEATURES, description="")
    info.set_file_format("tfrecord")
    lengths = [len(texts) for texts in shards]
    split = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=1, filename_template=template)
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(folder)
    return folder


SHARDS = [[b"zero", "\u00e9ins".encode(), b"tw\0o"], [b""], [b"four", b"five \xff", b"six"]]
TEXTS = ["zero", "\u00e9ins", "tw\0o", "", "four", None, "six"]


def test_tfrecord_is_read_without_tensorflow(tmp_path):
    source = Tfds(name_or_directory=str(prepare(tmp_path / "own" / "1.0.0", "own", SHARDS)))
    items = read(source)
    assert [item.id for item in items] == [f"own/train:{number}" for number in range(7)]
    assert [item.text if isinstance(item, Document) else None for item in items] == TEXTS
    assert items[5].rule == "undecodable"
    assert [(piece.files[0][0][-14:], piece.start, piece.stop) for piece in source.pieces()] == [
        ("00000-of-00003", 0, 3),
        ("00001-of-00003", 3, 4),
        ("00002-of-00003", 4, 7),
    ]
    assert any(name.endswith("tfrecord-00001-of-00003") for name, _ in source.files())


@pytest.mark.parametrize("slice_", ["[1:]", "[2:5]", "[3:4]", "[:6]", "[5:6]"])
def test_a_slice_of_tfrecord_has_its_records(tmp_path, slice_):
    folder = prepare(tmp_path / "own", "own", SHARDS)
    items = read(Tfds(name_or_directory=str(folder), split="train" + slice_))
    expected = eval("TEXTS" + slice_)
    assert [item.text if isinstance(item, Document) else None for item in items] == expected
    assert [item.id for item in items] == [f"own/train{slice_}:{number}" for number in range(len(expected))]


@pytest.mark.parametrize("cut", ["between records", "in a record", "in a header", "empty", "missing"])
def test_a_cut_shard_of_tfrecord_is_noticed(tmp_path, cut):
    folder = prepare(tmp_path / "own", "own", [[b"a", b"b", b"c"], [b"d"]])
    path = folder / "own-train.tfrecord-00000-of-00002"
    whole, two = path.read_bytes(), len(tfrecord([b"a", b"b"]))
    size = {"between records": two, "in a record": len(whole) - 7, "in a header": two + 5, "empty": 0, "missing": 0}
    path.write_bytes(whole[: size[cut]])
    if cut == "missing":
        path.unlink()
    *before, damage, after = read(Tfds(name_or_directory=str(folder)))
    n_read = 0 if cut in ("empty", "missing") else 2
    assert [item.text for item in before] == ["a", "b"][:n_read]
    assert (damage.rule, damage.id) == ("unreadable", f"own/train:{n_read}")
    assert path.name in damage.detail
    assert (after.id, after.text) == ("own/train:3", "d")


def test_a_damaged_length_or_record_of_tfrecord_is_noticed(tmp_path):
    for name, place, value in (("length", 0, b"\xff" * 8), ("record", 12, b"\xff" * 10)):
        folder = prepare(tmp_path / name, "own", [[b"a", b"b"], [b"c"]])
        path = folder / "own-train.tfrecord-00000-of-00002"
        content = bytearray(path.read_bytes())
        content[place : place + len(value)] = value
        path.write_bytes(content)
        damage, after = read(Tfds(name_or_directory=str(folder)))
        assert (damage.rule, after.text) == ("unreadable", "c")
        assert len(damage.detail) < 500


@pytest.fixture
def array_records(tmp_path) -> Path:
    """1,000 records in several shards."""
    writer = ShardWriter(tmp_path, "own", "train", shard_bytes=8000)
    for number in range(1000):
        writer.write(FEATURES.serialize_example({"text": f"text {number} " + "x" * (number % 50), "n": number}))
    write_metadata(tmp_path, "own", FEATURES, {"train": writer.finish()}, "")
    return tmp_path


def test_pieces_of_array_records_give_the_whole(array_records, monkeypatch):
    source = Tfds(name_or_directory=str(array_records))
    whole = read(source)
    n_shards = len(list(source.pieces()))
    assert n_shards > 2
    assert [(item.id, item.text) for item in whole] == [
        (f"own/train:{n}", f"text {n} " + "x" * (n % 50)) for n in range(1000)
    ]
    monkeypatch.setattr(tfds_source, "_RECORDS", 37)
    monkeypatch.setattr(tfds_source, "_BLOCK", 10)
    assert len(list(source.pieces())) > 3 * n_shards
    assert read(source) == whole


def test_a_damaged_shard_of_array_records_is_listed_by_name(array_records):
    source = Tfds(name_or_directory=str(array_records))
    pieces = list(source.pieces())
    path = pieces[1].files[0][1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (damaged,) = [item for item in read(source) if isinstance(item, Skipped)]
    assert (damaged.rule, damaged.id) == ("unreadable", f"own/train:{pieces[1].start}")
    assert damaged.detail.startswith(f"{pieces[1].stop - pieces[1].start} records of {path.name}")
    read_again = [item.id for item in read(source) if isinstance(item, Document)]
    assert {f"own/train:{n}" for n in range(1000) if not pieces[1].start <= n < pieces[1].stop} <= set(read_again)


def test_a_damaged_part_of_a_shard_costs_no_other(tmp_path):
    """Two chunks of a shard are overwritten: what can be read of it is read, and one row says how much is lost."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, "own", "train", shard_bytes=1 << 30)
    for number in range(3000):
        writer.write(FEATURES.serialize_example({"text": rng.bytes(60).hex(), "n": number}))
    write_metadata(tmp_path, "own", FEATURES, {"train": writer.finish()}, "")
    source = Tfds(name_or_directory=str(tmp_path))
    whole = read(source)
    ((_, path),) = next(source.pieces()).files
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 16] = bytes(range(16))
    path.write_bytes(content)
    *kept, lost = read(source)
    assert 1000 < len(kept) < 3000
    assert [item for item in whole if item in kept] == kept
    assert (lost.rule, lost.detail.split()[0]) == ("unreadable", str(3000 - len(kept)))


def test_a_record_without_text_is_a_bad_record(tmp_path):
    writer = ShardWriter(tmp_path, "own", "train", shard_bytes=1 << 30)
    writer.write(FEATURES.serialize_example({"text": "one", "n": 1}))
    writer.write(tfds.features.FeaturesDict({"n": tfds.features.Scalar(np.int64)}).serialize_example({"n": 2}))
    writer.write(FEATURES.serialize_example({"text": "three", "n": 3}))
    write_metadata(tmp_path, "own", FEATURES, {"train": writer.finish()}, "")
    items = read(Tfds(name_or_directory=tmp_path))
    assert [getattr(item, "text", None) or item.rule for item in items] == ["one", "bad_record", "three"]


def test_the_other_scalar_features_become_metadata(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Text(),
            "url": tfds.features.Text(),
            "score": tfds.features.Scalar(np.float32),
            "label": tfds.features.ClassLabel(names=["a", "b"]),
            "ok": tfds.features.Scalar(np.bool_),
            "vector": tfds.features.Tensor(shape=(2,), dtype=np.int64),
        }
    )
    writer = ShardWriter(tmp_path, "own", "train", shard_bytes=1 << 30)
    row = {"text": "t", "url": "é", "score": 0.5, "label": 1, "ok": True, "vector": [1, 2]}
    writer.write(features.serialize_example(row))
    write_metadata(tmp_path, "own", features, {"train": writer.finish()}, "")
    (item,) = read(Tfds(name_or_directory=tmp_path, text_feature="text"))
    assert item.meta == {"url": "é", "score": 0.5, "label": 1, "ok": True}
    assert json.loads(json.dumps(item.meta)) == item.meta


NAMED = {
    "c4": "c4/en/3.1.0",
    "c4/en": "c4/en/3.1.0",
    "wikipedia": "wikipedia/20230601.en/1.0.0",
    "wiki40b": "wiki40b/en/1.3.0",
    "wiki40b/de": "wiki40b/de/1.3.0",
    "lm1b": "lm1b/1.1.0",
    "tiny_shakespeare": "tiny_shakespeare/1.0.0",
    "pg19": "pg19/0.1.1",
}


def test_named_datasets_resolve_and_are_read_without_tensorflow(tmp_path):
    """In a process of its own, to see what it imports."""
    for name in ("lm1b", "tiny_shakespeare"):
        prepare(tmp_path / NAMED[name], name, [[b"one"], [b"two"]], NAMED[name].split("/")[-1])
    script = f"""
import json, sys
from efftrain.data.sources.tfds import Tfds
from efftrain.errors import CorpusError
texts, errors = {{}}, {{}}
for name in {list(NAMED)}:
    source = Tfds(name_or_directory=name, data_dir={str(tmp_path)!r})
    try:
        texts[name] = [item.text for piece in source.pieces() for item in source.documents(piece)]
    except CorpusError as error:
        errors[name] = str(error)
assert "tensorflow" not in sys.modules
print(json.dumps([texts, errors]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    texts, errors = json.loads(run.stdout.splitlines()[-1])
    assert texts == {"lm1b": ["one", "two"], "tiny_shakespeare": ["one", "two"]}
    for name in NAMED.keys() - texts.keys():
        assert str(tmp_path / NAMED[name]) in errors[name]
        assert errors[name].endswith(f"tfds build {name} --file_format=array_record --data_dir={tmp_path}")
    assert len(errors) == 6


def test_tfds_reads_the_corpus_that_efftrain_wrote(corpus):
    source = Tfds(name_or_directory=str(corpus.path / "text"), split="train", text_feature="text")
    assert [item.text for item in read(source)] == [d.text for d in corpus.documents("train")]
    assert any(name.startswith("text-train") for name, _ in source.files())


def test_tfds_says_how_to_mend_it(corpus, tmp_path):
    text = str(corpus.path / "text")
    with pytest.raises(CorpusError, match="4 text features"):
        read(Tfds(name_or_directory=text))
    with pytest.raises(CorpusError, match="no feature 'body'"):
        read(Tfds(name_or_directory=text, text_feature="body"))
    with pytest.raises(CorpusError, match="no split 'dev'; it has train, validation, test"):
        read(Tfds(name_or_directory=text, text_feature="text", split="dev"))
    with pytest.raises(CorpusError, match="tfds build lm1b --file_format=array_record"):
        list(Tfds(name_or_directory="lm1b", data_dir=str(tmp_path)).files())
    with pytest.raises(CorpusError, match="knows no dataset 'no_such_set'"):
        list(Tfds(name_or_directory="no_such_set", data_dir=str(tmp_path)).files())
    with pytest.raises(CorpusError, match="not a TFDS dataset"):
        list(Tfds(name_or_directory=str(tmp_path)).files())
