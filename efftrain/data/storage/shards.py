"""Writes ArrayRecord shards atomically, and the TFDS metadata that makes a folder of shards a dataset."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSION = "1.0.0"


@dataclass(frozen=True)
class Shard:
    """A finished shard. ``n_bytes`` is the size of its records, not of the file."""

    name: str
    n_records: int
    n_bytes: int


class ShardWriter:
    """Writes records to shards of about ``shard_bytes`` bytes.

    The name of a shard contains the number of shards, which is known only at the end. Until ``finish`` is called, a
    shard is named ``*.incomplete``.
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

            # group_size:1 because records are read at random, and a group is decompressed as a whole.
            self._writer = ArrayRecordWriter(str(self._incomplete(len(self._sizes))), "group_size:1")
            self._n_records = self._n_bytes = 0
        self._writer.write(record)
        self._n_records += 1
        self._n_bytes += len(record)
        if self._n_bytes >= self._shard_bytes:
            self._close_shard()

    def finish(self) -> list[Shard]:
        """Closes the last shard, flushes all shards to disk and gives them their final names."""
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
    """Returns the TFDS features of the documents of a corpus; ``meta`` is JSON."""
    from tensorflow_datasets import features

    return features.FeaturesDict({name: features.Text() for name in ("text", "id", "source", "meta")})


def token_features(block: int, dtype: Any) -> Any:
    """Returns the TFDS features of a block of packed tokens, stored as raw bytes, so that reading is a copy."""
    from tensorflow_datasets import features

    return features.FeaturesDict({"tokens": features.Tensor(shape=(block,), dtype=dtype, encoding="bytes")})


class Serializer:
    """Serialises records of a TFDS dataset deterministically: their bytes depend only on the values.

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
    """Writes the metadata for ``tfds.builder_from_directory(folder)``. Splits without a shard are omitted."""
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
    """Returns the blake2b digest of the content of a file, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as stream:
        buffer = bytearray(1 << 20)
        view = memoryview(buffer)
        while n := stream.readinto(buffer):
            state.update(view[:n])
    return state.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
