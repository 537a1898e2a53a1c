"""Reads batches from packed corpora with Grain: shuffled, mixed, divided among processes, and resumable at any batch.

The global order of batches depends only on the configuration. Of each global batch of B rows, process p of P reads
rows [p*B/P, (p+1)*B/P). Its position is the number of global batches, so that a run may be resumed with another number
of processes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.config import json_digest, to_json
from efftrain.data import corpus as corpora
from efftrain.data.corpus import Corpus
from efftrain.data.storage.packing import padding, row
from efftrain.data.storage.teacher_cache import TeacherCache
from efftrain.data.storage.teacher_records import no_teacher
from efftrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]

WRITTEN_TYPE = "efftrain.data.loader:LoaderConfig"  # part of saved positions, so that it stays if the class is moved


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture.

    Attributes:
      path: the folder of the corpus.
      weight: share of the rows that come from this corpus, relative to the weights of the other parts.
      rows: number of rows at the beginning of the split that are read. Documents are stored in shuffled order, so that
        this is a random sample. None: all rows.
      teacher: the folder of a teacher cache, written by ``efftrain teacher``. Batches then also have ``teacher_ids``
        and ``teacher_probs``, see ``TeacherCache.read``, and only the rows of the cache are read, in the same order as
        the same number of ``rows`` without a teacher. None: no teacher.
    """

    path: Path
    weight: float = 1.0
    rows: int | None = None
    teacher: Path | None = None

    def n_rows(self) -> int | None:
        """Returns the number of rows of the split that are read; None for all.

        Raises:
          ConfigError: the teacher cache has fewer rows than ``rows``.
          CorpusError: the teacher cache cannot be read.
        """
        if self.teacher is None:
            return self.rows
        n_taught = len(TeacherCache.open(self.teacher, verify=False))
        if self.rows is not None and self.rows > n_taught:
            raise ConfigError(
                f"loader.corpora: rows is {self.rows}, but the teacher cache {self.teacher} has {n_taught} rows; set "
                f"rows to at most {n_taught}, or make a larger cache with efftrain teacher"
            )
        return self.rows or n_taught


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Configuration of the batches that a run trains on.

    Attributes:
      corpora: the mixture. Its parts must have the same tokenizer.
      length: number of tokens per row.
      batch_size: number of rows per global batch, over all processes.
      split: the split of each corpus that is read.
      seed: seed of the shuffle.
      shuffle: shuffle the rows anew in each epoch. False keeps the order of the corpus.
      repeat: repeat the corpora without end and mix them by weight. False: read every row of every part once, ignoring
        the weights; the last batch is padded with rows whose mask is False.
      threads: number of reading threads per process.
      prefetch: number of batches that each process reads ahead.
    """

    corpora: tuple[Part, ...]
    length: int = 256
    batch_size: int = 16
    split: str = "train"
    seed: int = 0
    shuffle: bool = True
    repeat: bool = True
    threads: int = 2
    prefetch: int = 8

    def __post_init__(self):
        if not self.corpora:
            raise ConfigError("loader.corpora is empty; give at least one corpus")
        for part in self.corpora:
            if not 0 < part.weight < float("inf"):
                raise ConfigError(f"loader.corpora: the weight of {part.path} is {part.weight}; it must be positive")
            if part.rows is not None and part.rows < 1:
                raise ConfigError(
                    f"loader.corpora: rows of {part.path} is {part.rows}; give at least 1, or None for all"
                )
        for name in ("length", "batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loader.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"loader.seed (training.seed of a recipe) is {self.seed}; it must be from 0 to 2**32 - 1")


class PackedRows:
    """The rows of a split: row r has tokens [r*length, (r+1)*length) and the token after them. See ``packing.row``.

    Raises:
      ConfigError: the split is missing, or shorter than one row.
    """

    def __init__(self, corpus: Corpus, split: str, length: int):
        self._tokens, self._length = corpus.tokens(split), length
        self._end_of_text_id = corpus.end_of_text_id
        if len(self._tokens) <= length:
            raise ConfigError(
                f"length {length} needs {length + 1} tokens and split {split!r} of {corpus.path} has "
                f"{len(self._tokens)}; use a shorter length or a larger corpus"
            )

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._length)

    def __getitem__(self, number: int) -> Batch:
        start = number * self._length
        stream = self._tokens[start : start + self._length + 1]
        return row(stream, self._length, end_of_text_id=self._end_of_text_id)


class Loader:
    """An iterator over the rows of each batch that belong to this process.

    A batch is a dict of arrays, see ``packing.row``, of shape (batch_size / process_count, length). The arrays of a
    teacher have a third axis, see ``TeacherCache.read``.
    """

    def __init__(self, dataset: "grain.MapDataset", config: LoaderConfig, identity: str):
        import grain

        options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
        self._iterator = iter(dataset.to_iter_dataset(options))
        self._identity = identity
        self.n_batches = None if config.repeat else len(dataset)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def __length_hint__(self) -> int:
        return NotImplemented if self.n_batches is None else self.n_batches

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON values: the number of the next batch, and the identity of the data."""
        return {"next_batch": self._iterator.get_state()["next_index"], "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes at a position from ``get_state``, which may come from another process and another process count.

        Raises:
          RunError: the state belongs to other data, another seed, length or batch size.
        """
        if state["data"] != self._identity:
            raise RunError(
                "the saved position of the data belongs to another corpus, mixture, seed, length or batch size; "
                "restore these, or start a new run"
            )
        self._iterator.set_state({"next_index": state["next_batch"]})


def batches(config: LoaderConfig, process_index: int = 0, process_count: int = 1, *, verify: bool = True) -> Loader:
    """Opens the corpora of a mixture and returns an iterator over its batches.

    Args:
      config: the configuration, which must be the same on every process.
      process_index, process_count: the number of this process and of all processes, which select its part of each
        global batch.
      verify: compare the checksums of the corpora, see ``corpus.open``.

    Raises:
      ConfigError: the batch size is not divisible by the number of processes, a split is too short, or tokenizers or
        teachers differ.
      CorpusError: a corpus or a teacher cache is missing or damaged.
    """
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} is not one of {process_count}")
    if config.batch_size % process_count:
        raise ConfigError(
            f"loader.batch_size is {config.batch_size}, which is not divisible by the {process_count} processes; use a "
            f"multiple of {process_count}"
        )
    opened = [corpora.open(part.path, verify=verify) for part in config.corpora]
    _check_same_tokenizer(opened)
    caches = _open_caches(config, opened, verify=verify)
    local = config.batch_size // process_count
    rows = _rows(config, opened, caches)
    # There is no remainder to drop; the option keeps Grain's length of an endless data set an exact integer.
    local_batches = rows.batch(local, drop_remainder=True)[process_index::process_count]
    return Loader(local_batches, config, _identity(config, opened, caches))


def _open_caches(config: LoaderConfig, opened: list[Corpus], *, verify: bool) -> list[TeacherCache]:
    """Opens the teacher cache of each part; the list is empty if no part has one."""
    folders = [part.teacher for part in config.corpora if part.teacher is not None]
    if folders and len(folders) < len(config.corpora):
        raise ConfigError(
            "loader.corpora: some parts have a teacher cache and others have none; set teacher for all parts or for "
            "none"
        )
    caches = [TeacherCache.open(folder, verify=verify) for folder in folders]
    for corpus, cache in zip(opened, caches, strict=bool(caches)):
        cache.check_corpus(corpus, config.split, config.length)
        if (cache.plan.kind, cache.plan.teacher) != (caches[0].plan.kind, caches[0].plan.teacher):
            raise ConfigError(
                f"{caches[0].path} and {cache.path} come from different teachers or are of different kinds; make both "
                "with the same run and options"
            )
    return caches


def _rows(config: LoaderConfig, opened: list[Corpus], caches: list[TeacherCache]) -> "grain.MapDataset":
    """Returns the rows of the mixture in their global order."""
    import grain

    width = max((cache.width for cache in caches), default=0)
    parts = []
    for number, (part, corpus) in enumerate(zip(config.corpora, opened, strict=True)):
        packed = PackedRows(corpus, config.split, config.length)
        source: Any = TaughtRows(packed, caches[number], width) if caches else packed  # takes ints, as grain gives
        rows = grain.MapDataset.source(source)
        if (n_rows := part.n_rows()) is not None:
            if n_rows > len(packed):
                raise ConfigError(
                    f"loader.corpora: rows is {n_rows}, but split {config.split!r} of {corpus.path} has {len(packed)} "
                    f"rows of {config.length} tokens; give at most {len(packed)}, or None for all"
                )
            rows = rows[:n_rows]
        # Grain shuffles epoch e with seed + e. Hashing prevents that adjacent seeds or parts have an order in common.
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        parts.append(rows.shuffle(seed) if config.shuffle else rows)
    if config.repeat:
        weights = [part.weight for part in config.corpora]
        repeated = [rows.repeat() for rows in parts]
        return repeated[0] if len(parts) == 1 else grain.MapDataset.mix(repeated, weights)
    rows = parts[0] if len(parts) == 1 else grain.MapDataset.concatenate(parts)
    filling = padding(config.length) | (no_teacher(config.length, width) if caches else {})
    filled: Any = _Filled(rows, config.batch_size, filling)
    return grain.MapDataset.source(filled)


class TaughtRows:
    """The rows of a split, each with the predictions of a teacher."""

    def __init__(self, rows: PackedRows, cache: TeacherCache, width: int):
        self._rows, self._cache, self._width = rows, cache, width

    def __len__(self) -> int:
        return len(self._cache)

    def __getitem__(self, number: int) -> Batch:
        tokens = self._rows[number]
        return tokens | self._cache.read(number, tokens, width=self._width)


class _Filled:
    """Rows followed by rows of padding, so that the last global batch is complete on every process."""

    def __init__(self, rows: "grain.MapDataset[Any]", multiple: int, padding: Batch):
        self._rows, self._n_rows = rows, -(-len(rows) // multiple) * multiple
        self._padding = padding

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, number: int) -> Batch:
        if number >= len(self._rows):
            return self._padding
        row = self._rows[number]
        assert row is not None  # no row is filtered out
        return row


def _check_same_tokenizer(opened: list[Corpus]) -> None:
    digests = {corpus.manifest["files"]["tokenizer.json"]["blake2b"]: corpus.path for corpus in opened}
    if len(digests) > 1:
        one, other, *_ = digests.values()
        raise ConfigError(f"{one} and {other} have different tokenizers; build them with the same tokenizer")


def _identity(config: LoaderConfig, opened: list[Corpus], caches: list[TeacherCache]) -> str:
    """Digest of everything that determines the batches; the paths of corpora and caches and the threads do not."""
    decisive = {k: v for k, v in to_json(config).items() if k not in ("corpora", "threads", "prefetch")}
    mixture: list[list[Any]] = [
        [corpus.token_fingerprint, part.weight] for corpus, part in zip(opened, config.corpora, strict=True)
    ]
    for number, part in enumerate(config.corpora):
        if part.rows is not None or caches:  # only then, so that positions from before these options remain valid
            mixture[number] += [part.rows, caches[number].fingerprint if caches else None]
    return json_digest({**decisive, "type": WRITTEN_TYPE, "mixture": mixture})
