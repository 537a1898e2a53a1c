"""Provides the stages that find and remove near duplicates: compute signatures, group by band, verify.

The first stage writes the signatures and band hashes of each piece to disk. The second sorts one band at a time;
documents that share a bucket, directly or through others, form a component. The third removes a document of a
component only if its exact similarity to a kept document reaches the threshold; estimates alone remove nothing.
"""

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.batching import by_size
from efftrain.data.dedup.canary import check_recall, plant
from efftrain.data.dedup.lsh import band_edges, band_hashes, components
from efftrain.data.dedup.minhash import MinHash, document_hashes, signatures
from efftrain.data.dedup.shingles import shingle_set
from efftrain.data.dedup.verify import Match, leaders
from efftrain.data.stages.kept_documents import KeptDocuments, Reader
from efftrain.data.stages.removals import ExcludedDocuments, Survivors
from efftrain.data.stages.spool import unpack_record
from efftrain.data.stages.stage import Engine, run_stage, stem

NEAR_DUPLICATE = "near_duplicate"
_BATCH = 512 << 10  # bytes of text whose signatures are computed at once, so that the arrays fit into the cache
_ROW = 48  # bytes of memory per document while a band is sorted
_GROUP = 512  # number of documents that are verified as one item
_DIFFS = 3  # number of documents per cluster whose difference to the kept document is recorded
_DIFF_LINES, _DIFF_CHARS = 400, 2000


@dataclass(frozen=True)
class Sign:
    """Task: computes the signatures and band hashes of piece ``number``.

    It writes NNNNNN.numbers.npy (m,) int64, NNNNNN.signatures.npy (m, permutations) uint32 and NNNNNN.bands.npy
    (bands, m) uint64.
    """

    kept: KeptDocuments
    alive: Path
    config: MinHash
    within_source: bool

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        alive = np.load(self.alive, mmap_mode="r")
        start, stop = self.kept.starts[number : number + 2]
        numbers = start + np.flatnonzero(alive[start:stop])
        texts = (unpack_record(record)[3] for _, record in self.kept.records(alive, number))
        found = [sign(batch, self.config) for batch in by_size(texts, _BATCH)]
        signed = np.concatenate(found) if found else np.empty((0, self.config.n_permutations), np.uint32)
        sources = self.kept.index(number)["source"][numbers - start] if self.within_source else None
        np.save(folder / f"{stem(number)}.numbers.npy", numbers)
        np.save(folder / f"{stem(number)}.signatures.npy", signed)
        np.save(folder / f"{stem(number)}.bands.npy", band_hashes(signed, self.config.bands, sources))
        return {"signed": len(numbers)}


@dataclass(frozen=True)
class Signed:
    """Reads the files that ``Sign`` wrote."""

    folder: Path
    n_pieces: int

    def load(self, piece: int, what: str) -> np.ndarray:
        return np.load(self.folder / f"{stem(piece)}.{what}.npy", mmap_mode="r")

    def signatures(self, kept: KeptDocuments, numbers: np.ndarray) -> np.ndarray:
        """Returns the signatures of the given documents, (m, permutations) uint32."""
        rows = []
        for number in numbers:
            piece = kept.piece_of(number)
            row = int(np.searchsorted(self.load(piece, "numbers"), number))
            rows.append(np.array(self.load(piece, "signatures")[row]))
        return np.stack(rows)


@dataclass(frozen=True)
class GroupByBand:
    """Task: finds the edges between documents that share a bucket of a band, or of one of ``parts`` parts of a band.

    Bands are divided into parts if memory is short.
    """

    signed: Signed
    config: MinHash
    parts: int

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        band, part = divmod(number, self.parts)
        hashes, numbers = [], []
        for piece in range(self.signed.n_pieces):
            of_piece = np.array(self.signed.load(piece, "bands")[band])
            chosen = (of_piece >> np.uint64(32)) % np.uint64(self.parts) == part
            hashes.append(of_piece[chosen])
            numbers.append(self.signed.load(piece, "numbers")[chosen])
        edges, buckets = band_edges(np.concatenate(hashes), np.concatenate(numbers), self.config.max_bucket)
        np.save(folder / f"{stem(number)}.edges.npy", edges)
        return {"edges": len(edges), "largest": buckets.largest, "oversized": buckets.oversized}


@dataclass(frozen=True)
class Verify:
    """Task: compares the documents of a group of components and removes those similar to a kept document.

    Attributes:
      kept: the documents.
      signed: their signatures.
      config: the configuration.
      members: .npy (documents in components,) int64, the document numbers of all components, concatenated.
      bounds: .npy (components + 1,) int64, the index in ``members`` at which each component begins.
      groups: the components of item i are groups[i] to groups[i + 1].
      first_planted: number of the first document that ``canary.plant`` wrote.
    """

    kept: KeptDocuments
    signed: Signed
    config: MinHash
    members: Path
    bounds: Path
    groups: tuple[int, ...]
    first_planted: int

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        members, bounds = np.load(self.members, mmap_mode="r"), np.load(self.bounds, mmap_mode="r")
        excluded, clusters, planted = ExcludedDocuments(folder, number), Counter(), []
        with Reader(self.kept) as reader:
            for component in range(self.groups[number], self.groups[number + 1]):
                numbers = np.array(members[bounds[component] : bounds[component + 1]])
                is_planted = numbers >= self.first_planted
                self._remove(reader, self._matches(reader, numbers[~is_planted]), excluded, clusters)
                planted += [match.document for match in self._matches(reader, numbers[is_planted])]
        return excluded.close() | {"clusters": len(clusters), "planted": planted}

    def _matches(self, reader: Reader, numbers: np.ndarray) -> list[Match]:
        if len(numbers) < 2:
            return []
        ordered = _best_first(reader, numbers)
        return leaders(
            ordered,
            self.signed.signatures(self.kept, ordered),
            lambda document: shingle_set(reader.text(document), self.config.shingle),
            self.config,
        )

    def _remove(self, reader: Reader, matches: Sequence[Match], excluded: ExcludedDocuments, clusters: Counter) -> None:
        sizes = Counter(match.survivor for match in matches)
        for match in matches:
            clusters[match.survivor] += 1
            record = reader.record(match.document)
            survivor, _, _, text = unpack_record(reader.record(match.survivor))
            shown = clusters[match.survivor] <= _DIFFS
            excluded.add(
                match.document,
                record,
                NEAR_DUPLICATE,
                score=match.exact,
                survivor=survivor,
                estimated=match.estimated,
                bands=match.bands,
                cluster=survivor,
                cluster_size=sizes[match.survivor] + 1,
                diff=diff(text, unpack_record(record)[3]) if shown else None,
            )


def _best_first(reader: Reader, numbers: np.ndarray) -> np.ndarray:
    """Sorts document numbers by quality, then length (both descending), then id."""

    def key(number: int) -> tuple:
        record = unpack_record(reader.record(number))
        return -reader.entry(number)["quality"], -len(record[3]), record[0]

    return np.array(sorted(numbers.tolist(), key=key), np.int64)


def sign(texts: list[bytes], config: MinHash) -> np.ndarray:
    """Returns the signatures of texts in UTF-8, (texts, permutations) uint32."""
    return signatures(*document_hashes(texts, config), config)


def remove_near_duplicates(
    engine: Engine, work: Path, left: Survivors, config: MinHash, *, within_source: bool
) -> dict[str, Any]:
    """Runs the stages of near-duplicate removal, with planted pairs among the documents.

    Returns the configuration, counts and recall for the manifest.
    """
    kept = plant(left.kept, left.alive, config)
    alive = np.ones(len(kept), bool)
    alive[: len(left.alive)] = left.alive
    np.save(work / "near.alive.npy", alive)
    task = Sign(kept, work / "near.alive.npy", config, within_source)
    run_stage(engine, work, "sign", task, kept.n_pieces, "Signing documents")
    signed = Signed(work / "sign", kept.n_pieces)
    n_bytes = len(kept) * _ROW * engine.n_workers
    parts = max(1, -(-n_bytes // engine.budget))
    grouping = GroupByBand(signed, config, parts)
    buckets = run_stage(engine, work, "bands", grouping, config.bands * parts, "Grouping by band")
    members, labels = _components(work / "bands", len(buckets))
    bounds = np.append(np.flatnonzero(np.diff(labels, prepend=-1)), len(members))
    np.save(work / "members.npy", members)
    np.save(work / "bounds.npy", bounds)
    groups = _groups(bounds)
    verify = Verify(kept, signed, config, work / "members.npy", work / "bounds.npy", groups, len(left.kept))
    verified = run_stage(engine, work, "verify", verify, len(groups) - 1, "Verifying near duplicates")
    found = {number for summary in verified for number in summary["planted"]}
    return {
        "n_permutations": config.n_permutations,
        "bands": config.bands,
        "rows": config.rows,
        "threshold": config.threshold,
        "candidates": int(np.count_nonzero(members < len(left.kept))),
        "removed": left.apply(work / "verify", verified),
        "clusters": sum(summary["clusters"] for summary in verified),
        "largest_bucket": max(summary["largest"] for summary in buckets),
        "oversized_buckets": sum(summary["oversized"] for summary in buckets),
    } | check_recall(kept, found, members, labels, config)


def diff(survivor: bytes, removed: bytes) -> str:
    """Returns the first lines of a unified diff between a kept and a removed text."""
    old, new = (text.decode().splitlines()[:_DIFF_LINES] for text in (survivor, removed))
    lines = difflib.unified_diff(old, new, "survivor", "removed", lineterm="", n=1)
    return "\n".join(line[:200] for line in lines)[:_DIFF_CHARS]


def _components(folder: Path, n_items: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (members, labels): the documents sorted by component, and the label of the component of each."""
    edges = np.empty((0, 2), np.int64)
    members = labels = np.empty(0, np.int64)
    for item in range(n_items):  # one at a time, so that the earlier items are reduced to one edge per document
        edges = np.concatenate([edges, np.load(folder / f"{stem(item)}.edges.npy")])
        members, labels = components(edges)
        edges = np.stack([members, labels], axis=1)[members != labels]
    order = np.lexsort((members, labels))
    return members[order], labels[order]


def _groups(bounds: np.ndarray) -> tuple[int, ...]:
    """Groups consecutive components, so that each group has about ``_GROUP`` documents; returns the bounds."""
    groups = [0]
    for component in range(1, len(bounds)):
        if bounds[component] - bounds[groups[-1]] >= _GROUP or component == len(bounds) - 1:
            groups.append(component)
    return tuple(groups)
