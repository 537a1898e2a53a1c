"""Documents from a folder that Hugging Face ``datasets`` wrote, read with pyarrow alone."""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from efftrain.data.documents import Document, Skipped
from efftrain.data.parquet_source import Columns
from efftrain.data.sources import RANGE_BYTES, Piece, ranges_of
from efftrain.errors import CorpusError

_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset(Columns):
    """A folder that ``save_to_disk`` wrote, of one split or of several. The other attributes are those of ``Columns``.

    A dataset that lies on disk as Parquet or JSON, as on the hub, is read with ``Parquet`` or ``JsonLines``.

    Attributes:
      split: which split of a folder that holds several.
    """

    split: str = "train"

    def files(self) -> Iterator[tuple[str, Path]]:
        folder = self._folder()
        try:
            state = json.loads((folder / "state.json").read_text())
            names = [file["filename"] for file in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{folder} is not a folder that datasets.save_to_disk wrote (state.json: {error!r}); check the path"
            ) from error
        if state.get("_indices_data_files"):
            raise CorpusError(
                f"{folder} holds a selection that was not applied; save it again with a newer version of datasets"
            )
        if not names:
            raise CorpusError(f"{folder} holds no rows; check the source")
        yield from ((name, folder / name) for name in names)

    def ranges(self, path: Path, size: int) -> Iterable[tuple[int, int | None]]:
        """Ranges of record batches; finding them touches only their headers."""
        import pyarrow as pa

        if size <= RANGE_BYTES:
            return [(0, None)]
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                return ranges_of(batch.nbytes for batch in stream)
        except (OSError, pa.ArrowException):  # the reader will list it
            return [(0, None)]

    def documents(self, piece: Piece) -> Iterator[Document | Skipped]:
        import pyarrow as pa

        for name, path in piece.files:
            row = 0
            try:
                _check_end(path)
                with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                    self.columns(path, stream.schema.names)
                    for number, batch in enumerate(stream):
                        if piece.stop is not None and number >= piece.stop:
                            break
                        if number >= piece.start:
                            yield from self.rows(name, row, batch)
                        row += len(batch)
            except (OSError, pa.ArrowException) as error:
                yield Skipped(f"{name}:{row}", self.path.name, "unreadable", f"from this row on: {error}")

    def _folder(self) -> Path:
        splits = self.path / "dataset_dict.json"
        if not splits.is_file():
            return self.path
        known = json.loads(splits.read_text())["splits"]
        if self.split not in known:
            raise CorpusError(f"{self.path} has no split {self.split!r}; it has {', '.join(known)}")
        return self.path / self.split


def _check_end(path: Path) -> None:
    """Raises OSError for a stream that was cut: between two batches, Arrow takes that for its end."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(file.tell() - len(_END_OF_STREAM), 0))
        if file.read() != _END_OF_STREAM:
            raise OSError("the file is cut: it has no end-of-stream mark")
