"""Batches from packed corpora on Grain: shuffled, mixed, divided among processes, resumable to the batch.

The global order of batches depends on the configuration alone. Process p of P takes rows [p*B/P, (p+1)*B/P) of each
global batch of B rows, so its position is the number of global batches: a run may continue with another P.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.config import digest, to_json
from efftrain.data import corpus as corpora
from efftrain.data.corpus import Corpus
from efftrain.data.packing import row
from efftrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One corpus of a mixture. Its weight is its share of the rows, relative to the other parts."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a batch is made of.

    Attributes:
      corpora: the mixture. Its parts must have the same tokenizer.
      length: tokens per row.
      batch_size: rows per global batch, over all processes.
      split: which split of each corpus.
      seed: of the shuffle.
      shuffle: a new order of rows in each epoch; False keeps the order of the corpus.
      repeat: go on for ever, mixing by weight. False: every row of every part once, without regard to weights; the
        last batch is filled up with rows whose mask is False.
      threads: reading threads per process.
      prefetch: batches read ahead per process.
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
        for name in ("length", "batch_size", "threads", "prefetch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"loader.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"loader.seed is {self.seed}; it must be from 0 to 2**32 - 1")


class PackedRows:
    """Rows of a split: row r holds tokens [r*length, (r+1)*length) and the one after. See ``packing.row``.

    Raises:
      ConfigError: the split is missing, or shorter than one row.
    """

    def __init__(self, corpus: Corpus, split: str, length: int):
        self._tokens, self._length = corpus.tokens(split), length
        if len(self._tokens) <= length:
            raise ConfigError(
                f"length {length} needs {length + 1} tokens and split {split!r} of {corpus.path} has "
                f"{len(self._tokens)}; use a shorter length or a larger corpus"
            )

    def __len__(self) -> int:
        return -(-(len(self._tokens) - 1) // self._length)

    def __getitem__(self, number: int) -> Batch:
        start = number * self._length
        return row(self._tokens[start : start + self._length + 1], self._length)


class Loader:
    """An iterator over the local part of the batches.

    Each is a dict of (batch_size / process_count, length) arrays.
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

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON: which batch comes next, and of which data."""
        return {"next_batch": self._iterator.get_state()["next_index"], "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where ``get_state`` was called, in this or another process, with this or another process count.

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
    """Opens the corpora and starts reading.

    Args:
      config: the same on every process.
      process_index, process_count: which part of each global batch this process gets.
      verify: check the corpora's checksums; see ``corpus.open``.

    Raises:
      ConfigError: the batch does not divide among the processes, a split is too short, tokenizers differ.
      CorpusError: a corpus is missing or damaged.
    """
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process {process_index} is not one of {process_count}")
    if config.batch_size % process_count:
        raise ConfigError(
            f"loader.batch_size {config.batch_size} does not divide among {process_count} processes; use a multiple"
        )
    opened = [corpora.open(part.path, verify=verify) for part in config.corpora]
    _check_same_tokenizer(opened)
    local = config.batch_size // process_count
    rows = _rows(config, opened)
    # Dropping the remainder drops nothing here, and keeps Grain's length of an endless data set an exact integer.
    local_batches = rows.batch(local, drop_remainder=True)[process_index::process_count]
    return Loader(local_batches, config, _identity(config, opened))


def _rows(config: LoaderConfig, opened: list[Corpus]) -> "grain.MapDataset":
    """The global order of rows."""
    import grain

    parts = []
    for number, corpus in enumerate(opened):
        rows = grain.MapDataset.source(PackedRows(corpus, config.split, config.length))
        # Grain shuffles epoch e with seed + e: hashing first keeps neighbouring seeds and parts from sharing an order.
        seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
        parts.append(rows.shuffle(seed) if config.shuffle else rows)
    if config.repeat:
        weights = [part.weight for part in config.corpora]
        repeated = [rows.repeat() for rows in parts]
        return repeated[0] if len(parts) == 1 else grain.MapDataset.mix(repeated, weights)
    rows = parts[0] if len(parts) == 1 else grain.MapDataset.concatenate(parts)
    return grain.MapDataset.source(_Filled(rows, config.batch_size, config.length))


class _Filled:
    """Rows of padding behind the real ones, so that the last global batch is whole on every process."""

    def __init__(self, rows: "grain.MapDataset", multiple: int, length: int):
        self._rows, self._n_rows = rows, -(-len(rows) // multiple) * multiple
        self._padding = row(np.empty(0, np.int32), length)

    def __len__(self) -> int:
        return self._n_rows

    def __getitem__(self, number: int) -> Batch:
        return self._rows[number] if number < len(self._rows) else self._padding


def _check_same_tokenizer(opened: list[Corpus]) -> None:
    digests = {corpus.manifest["files"]["tokenizer.json"]["blake2b"]: corpus.path for corpus in opened}
    if len(digests) > 1:
        one, other, *_ = digests.values()
        raise ConfigError(f"{one} and {other} have different tokenizers; build them with the same tokenizer")


def _identity(config: LoaderConfig, opened: list[Corpus]) -> str:
    """Stands for what decides the global order; where the corpora lie and how they are read does not."""
    decisive = {k: v for k, v in to_json(config).items() if k not in ("corpora", "threads", "prefetch")}
    mixture = [[corpus.token_fingerprint, part.weight] for corpus, part in zip(opened, config.corpora, strict=True)]
    return digest({**decisive, "mixture": mixture})
