"""A teacher's next-token distributions for the rows of a corpus, kept on disk: the format, and its reader.

DIR/manifest.json              what it was made of (``CachePlan``), by which run, bytes per token, size and checksum of
                               every file
DIR/SPLIT-00000.array_record   the first ``shard_rows`` records; then the others

A record is one row of ``loader.PackedRows``. It begins with the digest of that row (``row_digest``); behind it, for all
positions of the row, little-endian, and with ID for uint16 (uint32 for a vocabulary above 65,536 entries):

top_k     ID[length, k]   float16[length, k]         the k largest probabilities as logarithms, largest first
sampled   uint8[length]   ID[total]   uint8[total]   how many tokens were drawn at each position; which; how often

Position t tells what follows the tokens up to t, as ``targets[t]`` does. Padding has no probabilities.
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

FORMAT = "teacher-cache-1"  # a corpus has a number: neither is taken for the other


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Writes a shard, which has its name when it is complete and on the disk."""
    from array_record.python.array_record_module import ArrayRecordWriter

    incomplete = path.with_name(f"{path.name}.incomplete")
    writer = ArrayRecordWriter(str(incomplete), "group_size:1")  # see ``shards.ShardWriter``
    for record in records:
        writer.write(record)
    writer.close()
    sync(incomplete)
    incomplete.rename(path)


def describe(plan: CachePlan, folder: Path, *, n_tokens: int) -> dict[str, Any]:
    """What the manifest says of a folder in which all shards are.

    Args:
      plan: of the cache.
      folder: of the shards.
      n_tokens: that its rows hold.
    """
    n_bytes = sum((folder / name).stat().st_size for name, _ in plan.shards())
    width = plan.n
    if plan.kind == "sampled":
        records, places = _records(plan, folder), slice(DIGEST_BYTES, DIGEST_BYTES + plan.length)
        width = max(1, *(max(records[row][places]) for row in range(plan.rows)))
    figures = {"width": width, "tokens": n_tokens, "bytes": n_bytes, "bytes_per_token": round(n_bytes / n_tokens, 2)}
    return {"format": FORMAT, "plan": asdict(plan), **figures}


class TeacherCache:
    """An opened cache. Reading is thread-safe; nothing is held in memory.

    Attributes:
      path: the folder.
      plan: what it was made of.
      width: entries of each position of ``read``'s arrays: the most that any has.
      manifest: with ``bytes_per_token``, and ``made_by``: run and step of the teacher.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]):
        self.path, self.manifest = path, manifest
        self.plan, self.width = CachePlan(**manifest["plan"]), int(manifest["width"])

    @classmethod
    def open(cls, path: Path | str, *, verify: bool = True) -> "TeacherCache":
        """Opens a folder that ``efftrain teacher`` made, and checks it.

        Args:
          path: the folder.
          verify: compare the checksum of every file; sizes are compared in any case. See ``corpus.open``.

        Raises:
          CorpusError: there is no cache, it is of another format, or a file is missing, truncated or altered.
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
        """Stands for the content, wherever the folder lies."""
        return digest({"plan": asdict(self.plan), "files": self.manifest["files"]})

    @cached_property
    def _shards(self) -> Any:
        return _records(self.plan, self.path)

    def read(self, number: int, row: Mapping[str, np.ndarray], *, width: int | None = None) -> Arrays:
        """What the teacher says of a row.

        Args:
          number: of the row in its split.
          row: its arrays, see ``packing.row``.
          width: entries of each position. None: ``self.width``; more are filled up.

        Returns:
          teacher_ids (length, width) int32 and teacher_probs (length, width) float32. Kind "top_k": the largest
          probabilities, first the largest; what a position lacks to 1 is the mass of all other tokens. Kind "sampled":
          the share of the draws that each token has; they sum to 1. What is not used is token 0 of probability 0, and
          so is all of padding.

        Raises:
          CorpusError: the cache was made from another row, or the record is damaged.
        """
        try:
            made_from, taught = decode(self.plan, self._shards[number], width or self.width)
        except (ValueError, OSError, RuntimeError) as error:
            raise CorpusError(
                f"row {number} of {self.path} is damaged ({error}); delete the folder and {_command(self.path)}"
            ) from error
        if made_from != row_digest(row):
            raise CorpusError(
                f"row {number} of {self.path} is not that of the corpus: the cache was made from other data; "
                f"delete the folder and {_command(self.path)}"
            )
        return taught

    def check_corpus(self, corpus: "Corpus", split: str, length: int) -> None:
        """Whether the cache is about these rows.

        Raises:
          CorpusError: it was made from another corpus.
          ConfigError: it was made for another split or length.
        """
        if self.plan.corpus != corpus.token_fingerprint:
            raise CorpusError(
                f"{self.path} was made from another corpus than {corpus.path}; "
                f"make one with: efftrain teacher RUN --corpus {corpus.path}"
            )
        if self.plan.split != split:
            raise ConfigError(
                f"{self.path} was made for split {self.plan.split!r} and loader.split is {split!r}; leave the teacher "
                f"out, or make another cache with: efftrain teacher RUN --split {split}"
            )
        if self.plan.length != length:
            raise ConfigError(
                f"{self.path} was made for rows of {self.plan.length} tokens and rows have {length} here; use "
                f"{self.plan.length}, or make another cache with: efftrain teacher RUN --length {length}"
            )

    def check_teacher(self, teacher: str) -> None:
        """Whether it was made by the model of this ``train.inputs.model_digest``.

        Raises:
          ConfigError: by another one.
        """
        if self.plan.teacher != teacher:
            raise ConfigError(
                f"{self.path} was made by another teacher ({self.made_by}); name that run, or make another cache with: "
                "efftrain teacher RUN"
            )

    @property
    def made_by(self) -> str:
        """Run and step of the teacher, for messages."""
        made_by = self.manifest.get("made_by", {})
        return f"run {made_by.get('run')}, step {made_by.get('step')}"


def read_cache_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
      CorpusError: it is damaged, of another format, or of something else.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        found = manifest["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{path / MANIFEST} is damaged ({error!r}); {_command(path)}") from error
    if found != FORMAT:
        raise CorpusError(
            f"{path} has format {found!r} and a teacher cache of this version has {FORMAT!r}; {_command(path)}"
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
    """What spares ArrayRecord opening every file at once."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def _records(plan: CachePlan, folder: Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([_Shard(str(folder / name), 0, len(rows), len(rows)) for name, rows in plan.shards()])
