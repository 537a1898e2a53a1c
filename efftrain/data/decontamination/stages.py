"""Provides the stages that remove contaminated documents; ``decontaminate`` defines what counts as contaminated."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.batching import by_size
from efftrain.data.decontamination.decontaminate import (
    BLOCK,
    Decontaminate,
    contamination,
    document_counts,
    hash_blocks,
    index_evaluation_set,
    seen_in_training,
)
from efftrain.data.decontamination.ngram_index import NgramIndex, hits
from efftrain.data.decontamination.readings import readings
from efftrain.data.dedup.shingles import distinct, ngram_hashes, wide_shingle_hashes
from efftrain.data.splits import SPLITS
from efftrain.data.stages.kept_documents import KeptDocuments
from efftrain.data.stages.removals import ExcludedDocuments, Survivors
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import Engine, run_stage, stem
from efftrain.progress import track

CONTAMINATED = "contaminated"  # the beginning of the rules "contaminated/SET" and "contaminated/SPLIT"


@dataclass(frozen=True)
class HashHeldOut:
    """Task: writes the distinct n-grams of the held-out documents of piece ``number`` to NNNNNN.ngrams.npy.

    Attributes:
      kept: the documents.
      held_out: .npy (documents,) bool, True for documents of validation and test.
      n: number of words per n-gram.
    """

    kept: KeptDocuments
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
class SavedIndex:
    """An ``EvaluationIndex`` on disk, from which the items of a stage load it."""

    name: str
    path: Path
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class CheckTraining:
    """Task: removes training documents that repeat an evaluation set, and counts held-out n-grams in the others.

    Attributes:
      kept: the documents.
      train: .npy (documents,) bool, True for documents of the training split.
      config: the configuration.
      held_out: the index of the n-grams of validation and test.
      sets: the evaluation sets.
    """

    kept: KeptDocuments
    train: Path
    config: Decontaminate
    held_out: Path
    sets: tuple[SavedIndex, ...]

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        excluded, by_set = ExcludedDocuments(folder, number), Counter()
        held_out, sets = NgramIndex.load(self.held_out), [NgramIndex.load(item.path) for item in self.sets]
        positions, counts = [], []
        for numbers, records in _blocks(self.kept, np.load(self.train, mmap_mode="r"), number):
            shares, hashes, offsets = self._compare([unpack_record(record)[3] for record in records], sets)
            stays = np.ones(len(numbers), bool)
            for item, of_set in zip(self.sets, shares, strict=True):
                for i in np.flatnonzero(stays & (of_set > self.config.threshold)):
                    excluded.add(numbers[i], records[i], f"{CONTAMINATED}/{item.name}", score=float(of_set[i]))
                    by_set[item.name] += 1
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
        return excluded.close() | {"by_set": by_set}

    def _compare(self, texts: list[bytes], sets: list[NgramIndex]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the contaminated shares of texts, and the hashes and offsets of their n-grams.

        The shares are (sets, texts), the largest of any variant and n-gram length. The n-grams have ``held_out_n``
        words and are those of the unchanged texts.
        """
        shares, n = np.zeros((len(sets), len(texts))), self.config.held_out_n
        lengths = {length for item in self.sets for length in item.lengths}

        def compare(length: int, hashes: np.ndarray, offsets: np.ndarray, owners: list[int]) -> None:
            for row, item, index in zip(shares, self.sets, sets, strict=True):
                if length in item.lengths:
                    np.maximum.at(row, owners, contamination(hashes, offsets, index))

        for length, hashes, offsets in ngram_hashes(texts, [n, *lengths]):
            compare(length, hashes, offsets, [*range(len(texts))])
            if length == n:
                plain = hashes, offsets
        others = [readings(text)[1:] if sets else [] for text in texts]
        owners = [owner for owner, forms in enumerate(others) for _ in forms]
        for batch in by_size(chain.from_iterable(others), BLOCK):
            for length, hashes, offsets in ngram_hashes(batch, lengths):
                compare(length, hashes, offsets, owners[: len(batch)])
            del owners[: len(batch)]
        return shares, *plain


@dataclass(frozen=True)
class CheckHeldOut:
    """Task: removes held-out documents whose n-grams are in the training split."""

    kept: KeptDocuments
    held_out: Path
    split_of: Path
    config: Decontaminate
    seen: Path

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        excluded, by_set = ExcludedDocuments(folder, number), Counter()
        seen, split_of = NgramIndex.load(self.seen), np.load(self.split_of, mmap_mode="r")
        for numbers, records in _blocks(self.kept, np.load(self.held_out, mmap_mode="r"), number):
            texts = [unpack_record(record)[3] for record in records]
            shares = contamination(*wide_shingle_hashes(texts, self.config.held_out_n), seen)
            for i in np.flatnonzero(shares > self.config.held_out_threshold):
                split = SPLITS[split_of[numbers[i]]]
                excluded.add(numbers[i], records[i], f"{CONTAMINATED}/{split}", score=float(shares[i]))
                by_set[split] += 1
        return excluded.close() | {"by_set": by_set}


def decontaminate(
    engine: Engine, work: Path, left: Survivors, split_of: np.ndarray, config: Decontaminate
) -> dict[str, dict[str, int]]:
    """Runs the stages of decontamination.

    Returns:
      For each evaluation set and held-out split ``documents``, the number of its documents, and ``removed``, the number
      of documents that were removed: from training for a set, from the split itself for a split. For a set also
      ``short``, the number of its documents that are too short to be protected, and ``n``, the number of words per
      n-gram.
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
        index = index_evaluation_set(item, config)
        figures[item.name] = {"documents": index.documents, "short": index.short, "n": index.n, "removed": 0}
        index.ngrams.save(folder / f"set{len(sets)}.npy")
        sets.append(SavedIndex(item.name, folder / f"set{len(sets)}.npy", index.lengths))

    def run(name: str, task: Any, title: str) -> Sequence[dict[str, Any]]:
        summaries = run_stage(engine, work, name, task, left.kept.n_pieces, title)
        for summary in summaries:
            for key, count in summary.get("by_set", {}).items():
                figures[key]["removed"] += count
        return summaries

    run("held_out", HashHeldOut(left.kept, held_out, config.held_out_n), "Hashing held-out documents")
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


def _blocks(kept: KeptDocuments, mask: np.ndarray, piece: int) -> Iterator[tuple[list[int], list[bytes]]]:
    """Yields (numbers, records) for blocks of documents that are small enough to be hashed fast."""
    start, stop = kept.starts[piece : piece + 2]
    numbers = (start + np.flatnonzero(mask[start:stop])).tolist()
    for records in by_size((record for _, record in kept.records(mask, piece)), BLOCK):
        yield numbers[: len(records)], records
        del numbers[: len(records)]
