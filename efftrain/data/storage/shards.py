"""ArrayRecord shards that are complete or not there, and the TFDS metadata that makes a folder of them a dataset."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "1.0.0"


@dataclass(frozen=True)
class Shard:
    """A finished shard. ``n_bytes`` counts the records, not the file."""

    name: str
    n_records: int
    n_bytes: int


class ShardWriter:
    """Writes records into shards of about ``shard_bytes``. A shard gets its name only when it is complete.

    Names carry the number of shards, which is known at the end; until then a shard is called ``*.incomplete``.
    """

    def __init__(self, folder: Path, dataset: str, split: str, *, shard_bytes: int):
        self._stem = f"{dataset}-{split}.array_record"
        self._folder, self._shard_bytes = folder, shard_bytes
        self._sizes: list[tuple[int, int]] = []
        self._writer: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, record: bytes) -> None:
        if self._writer is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            # group_size 1: what is read at random must not be decompressed with its neighbours.
            self._writer = ArrayRecordWriter(str(self._incomplete(len(self._sizes))), "group_size:1")
            self._n_records = self._n_bytes = 0
        self._writer.write(record)
        self._n_records += 1
        self._n_bytes += len(record)
        if self._n_bytes >= self._shard_bytes:
            self._close_shard()

    def finish(self) -> list[Shard]:
        """Closes the last shard, puts all of them on the disk and gives them their names."""
        if self._writer is not None:
            self._close_shard()
        shards = []
        for number, (n_records, n_bytes) in enumerate(self._sizes):
            name = f"{self._stem}-{number:05d}-of-{len(self._sizes):05d}"
            sync(self._incomplete(number))
            self._incomplete(number).rename(self._folder / name)
            shards.append(Shard(name, n_records, n_bytes))
        return shards

    def _incomplete(self, number: int) -> Path:
        return self._folder / f"{self._stem}-{number:05d}.incomplete"

    def _close_shard(self) -> None:
        self._writer.close()
        self._writer = None
        self._sizes.append((self._n_records, self._n_bytes))


def text_features() -> Any:
    """The TFDS features of a corpus's documents; ``meta`` is JSON."""
    from tensorflow_datasets import features

    return features.FeaturesDict({name: features.Text() for name in ("text", "id", "source", "meta")})


def token_features(block: int, dtype: Any) -> Any:
    """The TFDS features of a block of packed tokens, stored as raw bytes so that reading is a copy."""
    from tensorflow_datasets import features

    return features.FeaturesDict({"tokens": features.Tensor(shape=(block,), dtype=dtype, encoding="bytes")})


class Serializer:
    """Records of a TFDS dataset whose bytes depend on the values alone.

    ``features.serialize_example`` orders the fields of a record by hashes that change from process to process.
    """

    def __init__(self, features: Any):
        from tensorflow_datasets.core.example_serializer import ExampleSerializer

        self._features, self._serializer = features, ExampleSerializer(features.get_serialized_info())

    def __call__(self, values: Mapping[str, Any]) -> bytes:
        example = self._serializer.get_tf_example(self._features.encode_example(values))
        return example.SerializeToString(deterministic=True)


def write_metadata(
    folder: Path, dataset: str, features: Any, shards: Mapping[str, list[Shard]], description: str
) -> None:
    """Makes ``tfds.builder_from_directory(folder)`` work. Splits without a shard are left out."""
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name="efftrain.data"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, description=description)
    info.set_file_format("array_record")
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[shard.n_records for shard in written],
            num_bytes=sum(shard.n_bytes for shard in written),
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name=dataset, split=split, filetype_suffix="array_record"
            ),
        )
        for split, written in shards.items()
        if written
    ]
    info.set_splits(tfds.core.splits.SplitDict(splits))
    info.write_to_directory(folder)


def file_digest(path: Path) -> str:
    """blake2b of a file's content, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while n := stream.readinto(buffer):
            state.update(view[:n])
    return state.hexdigest()


def sync(path: Path) -> None:
    """Puts a file, or a folder's entries, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
