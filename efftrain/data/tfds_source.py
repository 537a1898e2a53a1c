"""Documents from a TensorFlow Datasets name or directory, read without TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from efftrain.data.documents import Document, Skipped
from efftrain.errors import CorpusError


@dataclass(frozen=True, kw_only=True)
class Tfds:
    """A split of a prepared TFDS dataset in ArrayRecord or Parquet, by name (``lm1b``) or by directory.

    Attributes:
      name_or_directory: a directory with ``dataset_info.json``, or a name that ``tfds.builder`` knows.
      text_feature: the feature that holds the text; by default the only text feature there is.
      data_dir: where named datasets were prepared; by default TFDS's own.
    """

    name_or_directory: str
    split: str = "train"
    text_feature: str | None = None
    data_dir: str | None = None

    def files(self) -> Iterator[tuple[str, Path]]:
        folder = Path(str(self._builder().data_path))
        yield from ((path.name, path) for path in sorted(folder.iterdir()) if path.is_file())

    def documents(self) -> Iterator[Document | Skipped]:
        builder = self._builder()
        feature = self._text_feature(builder.info.features)
        rows = self._rows(builder)
        name = f"{builder.name}/{self.split}"
        for start in range(0, len(rows), 256):
            keys = range(start, min(start + 256, len(rows)))
            for key, row in zip(keys, rows.__getitems__(list(keys)), strict=True):
                try:
                    text = row[feature].decode()
                except UnicodeDecodeError as error:
                    yield Skipped(f"{name}:{key}", name, "undecodable", str(error), len(row[feature]))
                else:
                    yield Document(f"{name}:{key}", text, name)

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        folder = Path(self.name_or_directory)
        if folder.is_dir():
            if not (folder / "dataset_info.json").is_file():
                raise CorpusError(f"{folder} is not a TFDS dataset (no dataset_info.json); give its version folder")
            builder = tfds.builder_from_directory(folder)
        else:
            builder = self._named_builder(tfds)
        kind = builder.info.file_format.file_suffix if builder.info.file_format else "unknown"
        if kind not in ("array_record", "parquet"):
            raise CorpusError(
                f"{self.name_or_directory} is stored as {kind}, which has no random access without TensorFlow; "
                f"prepare it again with: tfds build {builder.name} --file_format=array_record"
            )
        return builder

    def _named_builder(self, tfds: Any) -> Any:
        _ = tfds.text.C4  # registers the text datasets, which are otherwise not found without TensorFlow
        try:
            builder = tfds.builder(self.name_or_directory, data_dir=self.data_dir, file_format="array_record")
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            raise CorpusError(
                f"TFDS knows no dataset {self.name_or_directory!r}, and there is no such directory; see "
                "https://www.tensorflow.org/datasets/catalog or give a directory"
            ) from error
        if not Path(str(builder.data_path)).is_dir():
            place = f" --data_dir={self.data_dir}" if self.data_dir else ""
            raise CorpusError(
                f"the dataset {self.name_or_directory} is not prepared in {builder.data_path}; prepare it with: "
                f"tfds build {self.name_or_directory} --file_format=array_record{place}"
            )
        return builder

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
        return self.text_feature or names[0]

    def _rows(self, builder: Any) -> Any:
        try:
            return builder.as_data_source(self.split)
        except (ValueError, KeyError) as error:
            known = ", ".join(builder.info.splits)
            raise CorpusError(f"{self.name_or_directory} has no split {self.split!r}; it has {known}") from error
