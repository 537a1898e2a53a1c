"""The stages that keep evaluation and training apart; see ``decontaminate`` for what counts as contaminated."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.decontaminate import (
    Decontaminate,
    NgramIndex,
    contamination,
    document_counts,
    hash_blocks,
    hits,
    index_evaluation_set,
    ngram_hashes,
    seen_in_training,
)
from efftrain.data.kept import Kept
from efftrain.data.removals import Removal, Survivors
from efftrain.data.shingles import distinct
from efftrain.data.splits import SPLITS
from efftrain.data.spool import unpack_record
from efftrain.data.stages import Engine, run_stage, stem
from efftrain.progress import track

CONTAMINATED = "contaminated"  # of the rules "contaminated/SET" and "contaminated/SPLIT"


@dataclass(frozen=True)
class HashHeldOut:
    """The distinct n-grams of the held-out documents of piece ``number``: NNNNNN.ngrams.npy.

    Attributes:
      held_out: .npy (documents,) bool.
    """

    kept: Kept
    held_out: Path
    n: int

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        texts = (
            unpack_record(record)[3] for _, record in self.kept.records(np.load(self.held_out, mmap_mode="r"), number)
        )
        found = [distinct(hashes) for hashes, _ in hash_blocks(texts, self.n)]
        np.save(folder / f"{stem(number)}.ngrams.npy", distinct(np.concatenate([np.empty(0, np.uint64), *found])))
        return {}


@dataclass(frozen=True)
class CheckTraining:
    """Removes training documents that hold an evaluation set, and counts the held-out n-grams in the others.

    Attributes:
      train: .npy (documents,) bool.
      held_out: index of the n-grams of validation and test.
      sets: (name, index) of the evaluation sets.
    """

    kept: Kept
    train: Path
    config: Decontaminate
    held_out: Path
    sets: tuple[tuple[str, Path], ...]

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        removal, by_set = Removal(folder, number), Counter()
        held_out, sets = NgramIndex.load(self.held_out), [(name, NgramIndex.load(path)) for name, path in self.sets]
        positions, counts = [], []
        for numbers, records, hashes, offsets in _hashed(
            self.kept, np.load(self.train, mmap_mode="r"), number, self.config.n
        ):
            stays = np.ones(len(numbers), bool)
            for name, index in sets:
                shares = contamination(hashes, offsets, index)
                for i in np.flatnonzero(stays & (shares > self.config.limit)):
                    removal.add(numbers[i], records[i], f"{CONTAMINATED}/{name}", score=float(shares[i]))
                    by_set[name] += 1
                    stays[i] = False
            found = np.where(np.repeat(stays, np.diff(offsets)), hits(held_out, hashes), -1)
            where, n_documents = document_counts(found, offsets)
            positions.append(where)
            counts.append(n_documents)
        np.savez(
            folder / f"{stem(number)}.seen.npz",
            positions=np.concatenate([np.empty(0, np.int64), *positions]),
            counts=np.concatenate([np.empty(0, np.int64), *counts]),
        )
        return removal.close() | {"by_set": by_set}


@dataclass(frozen=True)
class CheckHeldOut:
    """Removes held-out documents whose n-grams are in the training split."""

    kept: Kept
    held_out: Path
    split_of: Path
    config: Decontaminate
    seen: Path

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        removal, by_set = Removal(folder, number), Counter()
        seen, split_of = NgramIndex.load(self.seen), np.load(self.split_of, mmap_mode="r")
        for numbers, records, hashes, offsets in _hashed(
            self.kept, np.load(self.held_out, mmap_mode="r"), number, self.config.n
        ):
            shares = contamination(hashes, offsets, seen)
            for i in np.flatnonzero(shares > self.config.held_out_limit):
                split = SPLITS[split_of[numbers[i]]]
                removal.add(numbers[i], records[i], f"{CONTAMINATED}/{split}", score=float(shares[i]))
                by_set[split] += 1
        return removal.close() | {"by_set": by_set}


def decontaminate(
    engine: Engine, work: Path, left: Survivors, split_of: np.ndarray, config: Decontaminate
) -> dict[str, dict[str, int]]:
    """Runs the stages.

    Returns:
      For each evaluation set and held-out split: its documents, and how many documents were removed, from training for
      a set, from the split itself for a split.
    """
    folder = work / "contamination"
    folder.mkdir(exist_ok=True)
    np.save(folder / "split_of.npy", split_of)
    held_out, train = folder / "held_out.npy", folder / "train.npy"
    np.save(held_out, left.alive & (split_of > 0))
    np.save(train, left.alive & (split_of == 0))
    figures = {
        split: {"documents": int((left.alive & (split_of == i)).sum()), "removed": 0}
        for i, split in enumerate(SPLITS)
        if i
    }
    sets = []
    for item in track(config.sets, "Reading evaluation sets", len(config.sets)):
        index = index_evaluation_set(item, config.n)
        figures[item.name] = {"documents": index.documents, "short": index.short, "removed": 0}
        index.ngrams.save(folder / f"set{len(sets)}.npy")
        sets.append((item.name, folder / f"set{len(sets)}.npy"))

    def run(name: str, task: Any, title: str) -> Sequence[dict[str, Any]]:
        summaries = run_stage(engine, work, name, task, left.kept.n_pieces, title)
        for summary in summaries:
            for key, count in summary.get("by_set", {}).items():
                figures[key]["removed"] += count
        return summaries

    run("held_out", HashHeldOut(left.kept, held_out, config.n), "Hashing held-out documents")
    parts = [work / "held_out" / f"{stem(number)}.ngrams.npy" for number in range(left.kept.n_pieces)]
    index = NgramIndex.build(np.load(path) for path in parts)
    index.save(folder / "held_out_ngrams.npy")
    task = CheckTraining(left.kept, train, config, folder / "held_out_ngrams.npy", tuple(sets))
    left.apply(work / "training", run("training", task, "Comparing training with evaluation"))
    totals = np.zeros(len(index), np.int64)
    for number in range(left.kept.n_pieces):
        with np.load(work / "training" / f"{stem(number)}.seen.npz") as seen:
            np.add.at(totals, seen["positions"], seen["counts"])
    seen_in_training(index, totals, config.common).save(folder / "seen.npy")
    checked = CheckHeldOut(left.kept, held_out, folder / "split_of.npy", config, folder / "seen.npy")
    left.apply(work / "checked", run("checked", checked, "Decontaminating held-out splits"))
    return figures


def _hashed(
    kept: Kept, mask: np.ndarray, piece: int, n: int
) -> Iterator[tuple[list[int], list[bytes], np.ndarray, np.ndarray]]:
    """Yields (numbers, records, hashes, offsets) of blocks of documents."""
    numbers: list[int] = []
    records: list[bytes] = []

    def texts() -> Iterator[bytes]:
        for number, record in kept.records(mask, piece):
            numbers.append(number)
            records.append(record)
            yield unpack_record(record)[3]

    for hashes, offsets in hash_blocks(texts(), n, ngram_hashes):
        yield numbers, records, hashes, offsets
        numbers.clear()
        records.clear()
