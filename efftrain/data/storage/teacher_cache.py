"""Stores the next-token distributions of a teacher for the rows of a corpus: the format of the cache and its reader.

DIR/manifest.json              the plan (``CachePlan``), the run of the teacher, bytes per token, and the size and
                               checksum of every file
DIR/SPLIT-00000.array_record   the first ``shard_rows`` records; further files have the others

A record is for one row of ``loader.PackedRows``. It consists of the digest of the row (``row_digest``) and the arrays
below for all positions, in little-endian order; ID is uint16, or uint32 for a vocabulary above 65,536 entries:

top_k     ID[length, k]   float16[length, k]         tokens and logarithms of the k largest probabilities, descending
sampled   uint8[length]   ID[total]   uint8[total]   number of distinct tokens sampled at each position; tokens; counts

Position t has the distribution of the token after position t, which is ``targets[t]``. Padding has no probabilities.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.config import digest
from efftrain.data.storage.shards import sync
from efftrain.data.storage.store import MANIFEST, check_files, unfinished_path
from efftrain.data.storage.teacher_records import DIGEST_BYTES, Arrays, CachePlan, decode, row_digest
from efftrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from efftrain.data.corpus import Corpus

FORMAT = "teacher-cache-1"  # the format of a corpus is a number, so that the two are never confused


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes a shard atomically: it gets its name when it is complete and flushed to disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    incomplete = path.with_name(f"{path.name}.incomplete")
    writer = ArrayRecordWriter(str(incomplete), "group_size:1")  # see ``shards.ShardWriter``
    for record in records:
        writer.write(record)
    writer.close()
    sync(incomplete)
    incomplete.rename(path)


def describe(plan: CachePlan, folder: Path, *, n_tokens: int) -> dict[str, Any]:
    """Returns the manifest of a complete folder of shards, except the files and the run.

    Args:
      plan: the plan of the cache.
      folder: the folder of the shards.
      n_tokens: number of tokens in its rows.
    """
    n_bytes = sum((folder / name).stat().st_size for name, _ in plan.shards())
    width = plan.n
    if plan.kind == "sampled":
        records, places = _records(plan, folder), slice(DIGEST_BYTES, DIGEST_BYTES + plan.length)
        width = max(1, *(max(records[row][places]) for row in range(plan.rows)))
    figures = {"width": width, "tokens": n_tokens, "bytes": n_bytes, "bytes_per_token": round(n_bytes / n_tokens, 2)}
    return {"format": FORMAT, "plan": asdict(plan), **figures}


class TeacherCache:
    """An opened teacher cache. Reading is thread-safe, and no records are held in memory.

    Attributes:
      path: the folder of the cache.
      plan: the parameters that determine its content.
      width: number of entries per position in the arrays of ``read``: the largest number that any position has.
      manifest: the content of ``manifest.json``, such as ``bytes_per_token`` and ``made_by``: run and step of the
        teacher.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.plan, self.width = CachePlan(**manifest["plan"]), int(manifest["width"])

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> "TeacherCache":
        """Opens and checks a cache that ``efftrain teacher`` wrote.

        Args:
          path: the folder of the cache.
          verify: compare the checksum of every file. If False, only the sizes are compared. See ``corpus.open``.

        Raises:
          CorpusError: there is no cache, it has another format, or a file is missing, truncated or altered.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise CorpusError(_what_is_missing(path))
        manifest = read_cache_manifest(path)
        try:
            cache = cls(path, manifest)
            check_files(path, manifest, contents=verify, hint=f"delete the folder and {_command(path)}")
        except (KeyError, TypeError, ValueError) as error:
            raise CorpusError(f"{path / MANIFEST} is damaged ({error!r}); {_command(path)}") from error
        return cache

    def __len__(self) -> int:
        return self.plan.rows

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content of the cache. It does not depend on the path."""
        return digest({"plan": asdict(self.plan), "files": self.manifest["files"]})

    @cached_property
    def _shards(self) -> Any:
        return _records(self.plan, self.path)

    def read(self, number: int, row: Mapping[str, np.ndarray], *, width: int | None = None) -> Arrays:
        """Returns the next-token distributions of the teacher for a row.

        Args:
          number: index of the row in its split.
          row: the arrays of the row, see ``packing.row``.
          width: number of entries per position. None: ``self.width``; a larger number adds unused entries.

        Returns:
          teacher_ids (length, width) int32 and teacher_probs (length, width) float32. For kind "top_k", these are the
          largest probabilities in descending order; the difference of their sum to 1 is the mass of all other tokens.
          For kind "sampled", they are the share of each token among the samples, and sum to 1. Unused entries, and all
          entries of padding, are token 0 with probability 0.

        Raises:
          CorpusError: the cache was made for another row, or the record is damaged.
        """
        try:
            made_from, taught = decode(self.plan, self._shards[number], width or self.width)
        except (ValueError, OSError, RuntimeError) as error:
            raise CorpusError(
                f"row {number} of {self.path} is damaged ({error}); delete the folder and {_command(self.path)}"
            ) from error
        if made_from != row_digest(row):
            raise CorpusError(
                f"row {number} of {self.path} differs from that row of the corpus: the cache was made from other data; "
                f"delete the folder and {_command(self.path)}"
            )
        return taught

    def check_corpus(self, corpus: "Corpus", split: str, length: int) -> None:
        """Checks that the cache was made for the rows of a corpus.

        Raises:
          CorpusError: the cache was made for another corpus.
          ConfigError: the cache was made for another split or length.
        """
        if self.plan.corpus != corpus.token_fingerprint:
            raise CorpusError(
                f"{self.path} was made from another corpus than {corpus.path}; "
                f"make one with: efftrain teacher RUN --corpus {corpus.path}"
            )
        if self.plan.split != split:
            raise ConfigError(
                f"{self.path} was made for split {self.plan.split!r}, but loader.split is {split!r}; train without a "
                f"teacher, or make another cache with: efftrain teacher RUN --split {split}"
            )
        if self.plan.length != length:
            raise ConfigError(
                f"{self.path} was made for rows of {self.plan.length} tokens, but rows have {length} here; use a "
                f"length of {self.plan.length}, or make another cache with: efftrain teacher RUN --length {length}"
            )

    def check_teacher(self, teacher: str) -> None:
        """Checks that the cache was made by the model with this ``train.inputs.model_digest``.

        Raises:
          ConfigError: the cache was made by another model.
        """
        if self.plan.teacher != teacher:
            raise ConfigError(
                f"{self.path} was made by another teacher ({self.made_by}); use that run as the teacher, or make "
                "another cache with: efftrain teacher RUN"
            )

    @property
    def made_by(self) -> str:
        """Run and step of the teacher, for messages."""
        made_by = self.manifest.get("made_by", {})
        return f"run {made_by.get('run')}, step {made_by.get('step')}"


def read_cache_manifest(path: Path) -> dict[str, Any]:
    """Reads the manifest of a cache.

    Raises:
      CorpusError: the manifest is damaged, has another format, or is not that of a cache.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path / MANIFEST} is damaged ({error!r}); {_command(path)}") from error
    if found != FORMAT:
        raise CorpusError(
            f"{path} has format {found!r}, but this version reads teacher caches of format {FORMAT!r}; {_command(path)}"
        )
    return manifest


def _what_is_missing(path: Path) -> str:
    if path.exists():
        return f"{path} is not a teacher cache (it has no {MANIFEST}); choose another folder"
    unfinished = unfinished_path(path)
    found = f" (a build was interrupted: {unfinished})" if unfinished.exists() else ""
    return f"there is no teacher cache {path}{found}; make it with: efftrain teacher RUN --out {path}"


def _command(path: Path) -> str:
    return f"build it again with: efftrain teacher RUN --out {path}"


@dataclass(frozen=True)
class _Shard:
    """The description of a shard with which ArrayRecord does not have to open every file at the start."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _records(plan: CachePlan, folder: Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    shards: list[Any] = [_Shard(str(folder / name), 0, len(rows), len(rows)) for name, rows in plan.shards()]
    return ArrayRecordDataSource(shards)
