"""Removes repeated lines or paragraphs (menus, notices, boilerplate) except their first occurrence in the corpus.

Raffel et al. 2020 (C4) keep each line in one page; CCNet (Wenzek et al. 2020) does the same with paragraphs. Here, the
first occurrence is kept, in the order of the sources and then within the document.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efftrain.data.stages.kept_documents import KeptDocuments
from efftrain.data.stages.removals import ExcludedDocuments, Survivors
from efftrain.data.stages.spool import replace_text, unpack_record
from efftrain.data.stages.stage import Engine, run_stage, stem
from efftrain.errors import ConfigError

REPEATED = "repeated_lines"
_PLACE = np.dtype([("hash", "<u8"), ("document", "<u8"), ("unit", "<u4")])


@dataclass(frozen=True, kw_only=True)
class LineDeduplication:
    """Configuration of line deduplication. Units are compared without case and surrounding white space.

    Attributes:
      unit: the unit of text that is compared: a line, or a paragraph (text between blank lines).
      min_chars: shorter units, in characters, are always kept: a bracket or "Introduction" is not boilerplate.
    """

    unit: Literal["line", "paragraph"] = "line"
    min_chars: int = 30

    def __post_init__(self):
        if self.unit not in ("line", "paragraph"):
            raise ConfigError(f"line_deduplication.unit is {self.unit!r}; choose line or paragraph")
        if self.min_chars < 1:
            raise ConfigError(f"line_deduplication.min_chars is {self.min_chars}; it must be at least 1")

    def split(self, text: str) -> list[str]:
        """Splits a text into units; their concatenation is the text."""
        return text.splitlines(keepends=True) if self.unit == "line" else re.split(r"(?<=\n)(?=[ \t]*\n)", text)

    def hashes(self, text: str) -> Iterator[tuple[int, int]]:
        """Yields (index, 64-bit hash) of the units with at least ``min_chars`` characters."""
        for place, unit in enumerate(self.split(text)):
            normal = unit.strip().lower()
            if len(normal) >= self.min_chars:
                yield place, int.from_bytes(hashlib.blake2b(normal.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class HashLines:
    """Task: writes the hashes of the units of piece ``number`` to NNNNNN.units.npy.

    Attributes:
      kept: the documents.
      alive: .npy (documents,) bool, the documents that have not been removed.
      config: the configuration.
      within_source: units of different sources are never equal.
    """

    kept: KeptDocuments
    alive: Path
    config: LineDeduplication
    within_source: bool

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        alive = np.load(self.alive, mmap_mode="r")
        start, sources = int(self.kept.starts[number]), self.kept.index(number)["source"].tolist()
        places = [
            (hash ^ (sources[document - start] if self.within_source else 0), document, unit)
            for document, record in self.kept.records(alive, number)
            for unit, hash in self.config.hashes(unpack_record(record)[3].decode())
        ]
        np.save(folder / f"{stem(number)}.units.npy", np.array(places, _PLACE))
        return {"units": len(places)}


@dataclass(frozen=True)
class FindRepeats:
    """Task: writes the repeated units in hash partition ``number`` of ``parts`` to NNNNNN.repeats.npy, by document."""

    units: Path
    n_pieces: int
    parts: int

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        found = []
        for piece in range(self.n_pieces):
            units = np.load(self.units / f"{stem(piece)}.units.npy")
            found.append(units[units["hash"] % np.uint64(self.parts) == number])
        units = np.concatenate(found)
        units = units[np.lexsort((units["unit"], units["document"], units["hash"]))]
        repeats = units[1:][units["hash"][1:] == units["hash"][:-1]]
        np.save(folder / f"{stem(number)}.repeats.npy", repeats[np.lexsort((repeats["unit"], repeats["document"]))])
        return {"repeats": len(repeats)}


@dataclass(frozen=True)
class CutLines:
    """Task: rewrites the records of piece ``number`` without repeated units; removes documents that become blank."""

    kept: KeptDocuments
    alive: Path
    config: LineDeduplication
    repeats: Path
    parts: int

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        start, stop = self.kept.starts[number : number + 2]
        cuts: dict[int, set[int]] = {}
        for part in range(self.parts):
            repeats = np.load(self.repeats / f"{stem(part)}.repeats.npy", mmap_mode="r")
            first, last = np.searchsorted(repeats["document"], [start, stop])
            for _, document, unit in repeats[first:last].tolist():
                cuts.setdefault(document, set()).add(unit)
        excluded, index = ExcludedDocuments(folder, number), self.kept.index(number)
        index["size"] = 0
        offset = n_bytes = 0
        with (folder / f"{stem(number)}.records").open("wb") as records:
            for document, record in self.kept.records(np.load(self.alive, mmap_mode="r"), number):
                if cut := cuts.get(document):
                    text = unpack_record(record)[3]
                    units = self.config.split(text.decode())
                    left = "".join(unit for place, unit in enumerate(units) if place not in cut)
                    if not left.strip():
                        excluded.add(document, record, REPEATED, score=1.0)
                        continue
                    excluded.cut(record, REPEATED, len(text) - len(left.encode()))
                    record = replace_text(record, left.encode())
                    n_bytes += len(text) - len(left.encode())
                    index["n_bytes"][document - start] = len(left.encode())
                index["offset"][document - start], index["size"][document - start] = offset, len(record)
                records.write(record)
                offset += len(record)
        np.save(folder / f"{stem(number)}.index.npy", index)
        return excluded.close() | {"edited": len(cuts), "cut_bytes": n_bytes}


def deduplicate_lines(
    engine: Engine, work: Path, left: Survivors, config: LineDeduplication, *, within_source: bool
) -> dict[str, int]:
    """Runs the stages of line deduplication.

    ``left`` then refers to the shortened documents. Returns the counts for the manifest.
    """
    kept, alive = left.kept, left.save(work / "lines.alive.npy")
    task = HashLines(kept, alive, config, within_source)
    hashed = run_stage(engine, work, "units", task, kept.n_pieces, "Hashing lines")
    n_bytes = 3 * _PLACE.itemsize * sum(summary["units"] for summary in hashed)
    parts = max(1, -(-n_bytes * engine.n_workers // engine.budget))
    find = FindRepeats(work / "units", kept.n_pieces, parts)
    found = run_stage(engine, work, "repeats", find, parts, "Finding repeated lines")
    cut = CutLines(kept, alive, config, work / "repeats", parts)
    summaries = run_stage(engine, work, "cut", cut, kept.n_pieces, "Cutting repeated lines")
    removed = left.apply(work / "cut", summaries)
    left.kept = KeptDocuments(work / "cut", np.diff(kept.starts))
    return {
        "repeats": sum(summary["repeats"] for summary in found),
        "edited": sum(summary["edited"] for summary in summaries),
        "bytes": sum(summary["cut_bytes"] for summary in summaries),
        "removed": removed,
    }
