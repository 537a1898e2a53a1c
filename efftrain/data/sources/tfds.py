"""Reads documents from a TensorFlow Datasets (TFDS) dataset, by name or directory, without TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.sources.base import Piece, as_document, check_local
from efftrain.data.sources.metadata import metadata
from efftrain.errors import CorpusError

_RECORDS = 4096  # number of records in a piece of a format with random access
_BLOCK = 256  # number of records that are read together


@dataclass(frozen=True, kw_only=True)
class Tfds:
    """Reads a split of a prepared TFDS dataset, by name (``lm1b``, ``wiki40b/en``) or by directory.

    ArrayRecord and Parquet are read with random access, and TFRecord sequentially, a shard at a time. The id of a
    document is ``dataset/split:number`` in every format; all other scalar features of its record become its ``meta``.
    Nothing is downloaded.

    Attributes:
      name_or_directory: a directory with ``dataset_info.json``, or a name that ``tfds.builder`` knows.
      split: a split or a slice of one (``train[:10%]``).
      text_feature: the feature that contains the text. None: the only text feature of the dataset.
      data_dir: the directory in which named datasets were prepared. None: the default of TFDS.
    """

    kind: ClassVar[str] = "text"

    name_or_directory: str
    split: str = "train"
    text_feature: str | None = None
    data_dir: str | None = None

    def __post_init__(self):
        for name in ("name_or_directory", "data_dir"):
            if (value := getattr(self, name)) is not None:
                check_local(f"Tfds.{name}", value)
                object.__setattr__(self, name, str(value))

    def files(self) -> Iterator[tuple[str, Path]]:
        folder = Path(str(self._builder().data_path))
        yield from ((path.name, path) for path in sorted(folder.iterdir()) if path.is_file())

    def pieces(self) -> Iterator[Piece]:
        """Yields pieces of 4,096 records of a shard, or whole shards for TFRecord.

        ``start`` and ``stop`` of a piece count the records of the split.
        """
        builder = self._builder()
        self._text_feature(builder.info.features)
        step = None if _kind(builder) == "tfrecord" else _RECORDS
        for path, first, _, n_records in self._shards(builder):
            for start in range(0, n_records, step or max(n_records, 1)):
                stop = min(start + (step or n_records), n_records)
                yield Piece(((path.name, path),), first + start, first + stop)

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        builder = self._builder()
        feature = self._text_feature(builder.info.features)
        read = self._tfrecords if _kind(builder) == "tfrecord" else self._random_access
        name = f"{builder.name}/{self.split}"
        ((shard, _),) = piece.files
        lost: list[int] = []
        reason: object = ""
        for number, row in read(builder, piece):
            place = f"{name}:{number}"
            if isinstance(row, Exception):
                lost.append(number)
                reason = reason or row
                continue
            meta = metadata(((key, _plain(value)) for key, value in row.items()), (feature,))
            yield as_document(place, name, row[feature], meta)
        if lost:
            detail = f"{len(lost)} records of {shard}, from this one on: {str(reason)[:300]}"
            yield Skipped(f"{name}:{lost[0]}", name, UNREADABLE, detail)

    def _random_access(self, builder: Any, piece: Piece) -> Iterator[tuple[int, Any]]:
        """Yields (number, record or error), reading blocks of records.

        The records of a damaged block are read one by one. ArrayRecord returns empty records for a truncated shard.
        """
        assert piece.stop is not None  # see ``pieces``
        rows = builder.as_data_source(self.split)
        cut = ValueError("the shard is truncated or damaged: the record is empty")
        cut_gives_empty = _kind(builder) == "array_record"
        for start in range(piece.start, piece.stop, _BLOCK):
            numbers = range(start, min(start + _BLOCK, piece.stop))
            try:
                block = rows.__getitems__(list(numbers))
            except Exception:  # protobuf and TFDS raise their own classes for a damaged record
                block = [_record_or_error(rows, number) for number in numbers]
            for number, row in zip(numbers, block, strict=True):
                empty = cut_gives_empty and isinstance(row, dict) and all(value is None for value in row.values())
                yield number, cut if empty else row

    def _tfrecords(self, builder: Any, piece: Piece) -> Iterator[tuple[int, Any]]:
        """Yields (number, record or error), reading a shard sequentially.

        Grain's reader detects a cut within a record; a cut between two records shows only in the number of records.
        """
        import grain

        ((_, path),) = piece.files
        stop = piece.stop
        assert stop is not None  # see ``pieces``
        _, first, skip, _ = next(shard for shard in self._shards(builder) if shard[0] == path)
        number = first - skip  # number of the first record in the file; negative if the slice begins after it
        try:
            for record in grain.experimental.TFRecordIterDataset(str(path)):
                if number >= stop:
                    return
                if number >= piece.start:
                    yield number, builder.info.features.deserialize_example_np(record)
                number += 1
            if number < stop:
                raise ValueError(f"the shard ends here, but the dataset's metadata count {stop - number} more records")
        except Exception as error:  # protobuf and TFDS raise their own classes for a damaged record
            yield from ((left, error) for left in range(max(number, piece.start), stop))

    def _shards(self, builder: Any) -> Iterator[tuple[Path, int, int, int]]:
        """Yields (path, number of its first record in the split, records to skip in the file, records to read)."""
        first = 0
        try:
            instructions = builder.info.splits[self.split].file_instructions
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise CorpusError(f"{self.name_or_directory} has no split {self.split!r}; it has {known}") from error
        for item in instructions:
            yield Path(item.filename), first, item.skip, item.take
            first += item.take

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        folder = Path(self.name_or_directory)
        if folder.is_dir():
            if not (folder / "dataset_info.json").is_file():
                raise CorpusError(f"{folder} is not a TFDS dataset (no dataset_info.json); give its version folder")
            builder = tfds.builder_from_directory(folder)
        else:
            builder = self._named_builder(tfds)
        if (kind := _kind(builder)) not in ("array_record", "parquet", "tfrecord"):
            raise CorpusError(
                f"{self.name_or_directory} is stored as {kind}, which cannot be read without TensorFlow; prepare it "
                f"again with: {self._build_command()}"
            )
        return builder

    def _named_builder(self, tfds: Any) -> Any:
        _ = tfds.text.C4  # registers the text datasets, which TFDS does not find without TensorFlow otherwise
        try:
            builder = tfds.builder(self.name_or_directory, data_dir=self.data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise CorpusError(
                f"TFDS knows no dataset {self.name_or_directory!r}, and there is no such directory; see "
                "https://www.tensorflow.org/datasets/catalog or give a directory"
            ) from error
        if not Path(str(builder.data_path)).is_dir():
            raise CorpusError(
                f"the dataset {self.name_or_directory} is not prepared in {builder.data_path}; prepare it with: "
                f"{self._build_command()}"
            )
        return builder

    def _build_command(self) -> str:
        place = f" --data_dir={self.data_dir}" if self.data_dir else ""
        return f"tfds build {self.name_or_directory} --file_format=array_record{place}"

    def _text_feature(self, features: Any) -> str:
        import tensorflow_datasets as tfds

        names = [name for name, kind in features.items() if isinstance(kind, tfds.features.Text)]
        if self.text_feature and self.text_feature not in features:
            raise CorpusError(
                f"{self.name_or_directory} has no feature {self.text_feature!r}; it has {', '.join(features)}"
            )
        if not self.text_feature and len(names) != 1:
            raise CorpusError(
                f"{self.name_or_directory} has {len(names)} text features ({', '.join(names)}); choose one with "
                "text_feature"
            )
        if self.text_feature and self.text_feature not in names:
            raise CorpusError(
                f"the feature {self.text_feature!r} of {self.name_or_directory} is not text; use one of {names}"
            )
        return self.text_feature or names[0]


def _record_or_error(rows: Any, number: int) -> Any:
    try:
        return rows[number]
    except Exception as error:
        return error


def _plain(value: Any) -> Any:
    """Converts a scalar feature to a Python value, and invalid UTF-8 to None; returns anything else unchanged."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value.item() if isinstance(value, np.generic) else value


def _kind(builder: Any) -> str:
    return builder.info.file_format.file_suffix if builder.info.file_format else "unknown"
