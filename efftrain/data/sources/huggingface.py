"""Reads documents from a folder that Hugging Face ``datasets`` saved, with pyarrow alone."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from efftrain.data.sources.arrow import Arrow
from efftrain.errors import CorpusError


@dataclass(frozen=True, kw_only=True)
class HuggingFaceDataset(Arrow):
    """Reads documents from a folder that ``save_to_disk`` wrote, with one split or several.

    The other attributes are those of ``Columns``. Use ``Parquet`` or ``JsonLines`` for a dataset in these formats, as
    on the hub, and ``Arrow`` for ``.arrow`` files without ``state.json``, as in the cache of ``datasets``.

    Attributes:
      split: the split to read; has no effect in a folder with a single split.
    """

    split: str = "train"

    def files(self) -> Iterator[tuple[str, Path]]:
        folder = self._folder()
        try:
            state = json.loads((folder / "state.json").read_text())
            names = [file["filename"] for file in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{folder} is not a folder that datasets.save_to_disk wrote (state.json: {error!r}); check the path, "
                "or read a folder of .arrow files with Arrow"
            ) from error
        if state.get("_indices_data_files"):
            raise CorpusError(
                f"{folder} holds a selection of rows that was not applied; save it again with a newer version of "
                "datasets"
            )
        if not names:
            raise CorpusError(f"{folder} holds no rows; check the source")
        yield from ((name, folder / name) for name in names)

    def _folder(self) -> Path:
        splits = self.path / "dataset_dict.json"
        if not splits.is_file():
            return self.path
        try:
            known = json.loads(splits.read_text())["splits"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{splits} is damaged ({error!r}); save the dataset again") from error
        if self.split not in known:
            raise CorpusError(f"{self.path} has no split {self.split!r}; it has {', '.join(known)}")
        return self.path / self.split
