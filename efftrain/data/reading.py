"""The first stage of a build: read the pieces of the sources, edit and judge each document, keep it or say why not.

An item is a piece. It leaves

  NNNNNN.records          the documents that all rules keep, one after the other
  NNNNNN.index.npy        (kept,) of INDEX
  NNNNNN.scores.parquet   the scores of every document that could be decoded
  NNNNNN.removed.parquet  the evidence of those that were dropped
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.dedup import text_digest
from efftrain.data.documents import Document, Skipped, Text
from efftrain.data.evidence import Evidence, clean
from efftrain.data.funnel import Funnel
from efftrain.data.rules import Edit, Judgement, Rule, RuleSet, flatten, is_edit, judge
from efftrain.data.sources import Piece, Source
from efftrain.data.spool import pack_document, stable_hash, unpack_record
from efftrain.data.stages import stem
from efftrain.errors import CorpusError

EDITED, EMPTY, UNDECODABLE = "edited", "empty", "undecodable"
INDEX = np.dtype(
    [
        ("offset", "<u8"),  # of the record in its file
        ("size", "<u8"),  # of the record
        ("n_bytes", "<u8"),  # of the text
        ("order", "<u8"),  # hash that decides the place in the corpus
        ("group", "<u8"),  # hash of the package
        ("source", "<u8"),  # hash of the source
        ("digest_high", "<u8"),  # of the normalised text
        ("digest_low", "<u8"),
        ("quality", "<f4"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Reads piece ``number``.

    Attributes:
      pieces: (index of the source, piece).
      seed, split_seed: of the order of the documents and of the choice of packages.
      quality: the rule whose score says which of two duplicates is kept.
      scores: a table of an earlier build of the same inputs, and how many of its rows come before each piece.
    """

    sources: tuple[Source, ...]
    pieces: tuple[tuple[int, Piece], ...]
    rules: tuple[Rule | RuleSet | Edit, ...]
    seed: int
    split_seed: int
    quality: str | None
    scores: tuple[Path, tuple[int, ...]] | None = None

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        source, piece = self.pieces[number]
        rules = tuple(flatten(self.rules))
        path, funnels = folder / stem(number), Funnels()
        evidence = Evidence(Path(f"{path}.removed.parquet"))
        scores = Scores(Path(f"{path}.scores.parquet"), rules)
        known = self._known_scores(number, rules)
        index: list[tuple] = []
        offset = 0
        with Path(f"{path}.records").open("wb") as records:
            for item in self.sources[source].documents(piece):
                kept = item if isinstance(item, Skipped) else _encodable(item)
                if isinstance(kept, Skipped):
                    funnels.see(kept.source, kept.n_bytes)
                    funnels.drop(kept.source, kept.rule, kept.n_bytes)
                    evidence.add(id=kept.id, source=kept.source, rule=kept.rule, n_bytes=kept.n_bytes, text=kept.detail)
                    continue
                document, text = item, kept
                funnels.see(document.source, len(text.utf8))
                found = judge(rules, text, known and next(known)[clean(document.id)])
                scores.add(document, len(text.utf8), found)
                if found.edited:
                    funnels.cut(document.source, EDITED, len(text.utf8) - len(found.text.utf8))
                text = found.text
                rejected = found.verdict
                if rejected is not None or not text.text or text.text.isspace():
                    rule = rejected.rule if rejected else EMPTY
                    funnels.drop(document.source, rule, len(text.utf8))
                    evidence.add(
                        id=document.id,
                        source=document.source,
                        rule=rule,
                        score=rejected.score if rejected else 0.0,
                        n_bytes=len(text.utf8),
                        text=text.text,
                    )
                    continue
                record = pack_document(document, text.utf8)
                digest = text_digest(text.text)
                index.append(
                    (
                        offset,
                        len(record),
                        len(text.utf8),
                        stable_hash(document.id, f"order {self.seed}"),
                        stable_hash(document.package, f"split {self.split_seed}"),
                        stable_hash(document.source, "source"),
                        int.from_bytes(digest[:8], "little"),
                        int.from_bytes(digest[8:], "little"),
                        found.scores[self.quality] if self.quality else 0.0,
                    )
                )
                records.write(record)
                offset += len(record)
        evidence.close()
        scores.close()
        np.save(f"{path}.index.npy", np.array(index, INDEX))
        return {"kept": len(index), "scored": scores.n_rows, "sources": funnels.to_json()}

    def _known_scores(self, number: int, rules: tuple[Rule | Edit, ...]) -> Iterator[dict] | None:
        if self.scores is None:
            return None
        path, starts = self.scores
        return _read_scores(path, starts[number], [rule.name for rule in rules if not is_edit(rule)])


class Funnels:
    """One funnel a source."""

    def __init__(self):
        self._of: dict[str, Funnel] = {}

    def see(self, source: str, n_bytes: int) -> None:
        self._of.setdefault(clean(source), Funnel()).see(n_bytes)

    def drop(self, source: str, rule: str, n_bytes: int) -> None:
        self._of.setdefault(clean(source), Funnel()).drop(rule, n_bytes)

    def cut(self, source: str, rule: str, n_bytes: int) -> None:
        self._of.setdefault(clean(source), Funnel()).cut(rule, n_bytes)

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds what ``to_json`` of another gave."""
        for source, count in counts.items():
            self._of.setdefault(source, Funnel()).add(count)

    def to_json(self) -> dict[str, Any]:
        return {source: funnel.to_json() for source, funnel in self._of.items()}

    def rows(self, order: Sequence[str]) -> dict[str, list[dict]]:
        return {source: funnel.rows(order) for source, funnel in self._of.items()}

    def total(self) -> Funnel:
        total = Funnel()
        for funnel in self._of.values():
            total.add(funnel.to_json())
        return total


class Scores:
    """Rows of ``scores.parquet``: id, source, bytes, rejected_by, and a column for each rule."""

    def __init__(self, path: Path, rules: Sequence[Rule | Edit]):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._names = [rule.name for rule in rules if not is_edit(rule)]
        fixed = [("id", pa.string()), ("source", pa.string()), ("bytes", pa.int64()), ("rejected_by", pa.string())]
        self._schema = pa.schema(fixed + [(name, pa.float64()) for name in self._names])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[tuple] = []
        self.n_rows = 0

    def add(self, document: Document, n_bytes: int, found: Judgement) -> None:
        rule = found.verdict.rule if found.verdict else None
        values = [found.scores[name] for name in self._names]
        self._rows.append((clean(document.id), clean(document.source), n_bytes, rule, *values))
        self.n_rows += 1
        if len(self._rows) >= 4096:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._rows.clear()


def _read_scores(path: Path, start: int, names: list[str]) -> Iterator[dict[str, dict[str, float]]]:
    """Yields {id: scores} from row ``start`` on. The id is checked by the look-up."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            n_rows = file.metadata.row_group(group).num_rows
            if n_rows <= start:
                start -= n_rows
                continue
            table = file.read_row_group(group, columns=["id", *names]).slice(start)
            start = 0
            columns = [table.column(name).to_pylist() for name in names]
            for id, *values in zip(table.column("id").to_pylist(), *columns, strict=True):
                yield {id: dict(zip(names, values, strict=True))}


class Kept:
    """The documents that the first stage kept, numbered from 0 through all pieces."""

    def __init__(self, folder: Path, counts: Sequence[int]):
        self.folder = folder
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: tuple[int, Any] | None = None
        self._entries: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without what is open, for another process."""
        return self.__dict__ | {"_open": None, "_entries": {}}

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def n_pieces(self) -> int:
        return len(self.starts) - 1

    def index(self, piece: int) -> np.ndarray:
        """(documents of the piece,) of INDEX, mapped from disk."""
        path = self.folder / f"{stem(piece)}.index.npy"
        return np.load(path, mmap_mode="r" if self.starts[piece] < self.starts[piece + 1] else None)

    def column(self, name: str) -> np.ndarray:
        """A field of INDEX for all documents."""
        return np.concatenate([np.array(self.index(piece)[name]) for piece in range(self.n_pieces)] or [[]])

    def records(self, piece: int) -> Iterator[bytes]:
        """The records of a piece, in order."""
        with self._path(piece).open("rb") as stream:
            for size in self.index(piece)["size"]:
                yield stream.read(int(size))

    def piece_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def entry(self, number: int) -> np.void:
        """One row of INDEX."""
        piece = self.piece_of(number)
        if piece not in self._entries:
            self._entries[piece] = self.index(piece)
        return self._entries[piece][number - self.starts[piece]]

    def record(self, number: int) -> bytes:
        """One record; neighbours are fastest."""
        piece = self.piece_of(number)
        if self._open is None or self._open[0] != piece:
            if self._open is not None:
                self._open[1].close()
            self._open = piece, self._path(piece).open("rb")
        entry = self.entry(number)
        self._open[1].seek(int(entry["offset"]))
        return self._open[1].read(int(entry["size"]))

    def text(self, number: int) -> bytes:
        """The text of one document in UTF-8."""
        return unpack_record(self.record(number))[3]

    def _path(self, piece: int) -> Path:
        return self.folder / f"{stem(piece)}.records"


def list_pieces(sources: Sequence[Source]) -> tuple[tuple[int, Piece], ...]:
    """(index of the source, piece) for all sources, in order.

    Raises:
      CorpusError: a source has no file.
    """
    pieces = tuple((number, piece) for number, source in enumerate(sources) for piece in source.pieces())
    if not pieces:
        raise CorpusError("the sources hold no document; check their paths and patterns")
    return pieces


def _encodable(document: Document) -> Text | Skipped:
    text = Text(document.text, document.id)
    try:
        _ = text.utf8
    except UnicodeEncodeError as error:  # JSON and some codecs can spell half a surrogate pair
        return Skipped(document.id, document.source, UNDECODABLE, str(error), text.n_chars)
    return text
