"""Reads the documents that the first stage kept and that all later stages work on.

A piece consists of NNNNNN.records, its concatenated documents (see ``spool``), and NNNNNN.index.npy, (documents,) of
``INDEX``. No file stays mapped or open between two calls, except in a ``Reader``, which closes its file.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from efftrain.data.documents import Document, Text
from efftrain.data.stages.spool import stable_hash, unpack_record
from efftrain.data.stages.stage import stem

INDEX: np.dtype = np.dtype(
    [
        ("offset", "<u8"),  # position of the record in its file
        ("size", "<u8"),  # bytes of the record
        ("n_bytes", "<u8"),  # bytes of the text
        ("order", "<u8"),  # hash of the id, which determines the order of the corpus
        ("group", "<u8"),  # hash of the name of the group
        ("source", "<u8"),  # hash of the source
        ("digest_high", "<u8"),  # halves of the digest of the normalised text
        ("digest_low", "<u8"),
        ("quality", "<f4"),  # the larger, the better: decides which of two near duplicates is kept
    ]
)
_INDICES = 64  # number of pieces whose index a reader caches


def index_entry(
    document: Document,
    text: Text,
    digest: bytes,
    *,
    offset: int,
    size: int,
    seed: int,
    split_seed: int,
    quality: float,
) -> tuple:
    """Returns the row of ``INDEX`` for a document.

    Args:
      document: the document.
      text: its text after all edits.
      digest: ``dedup.exact.text_digest`` of the text.
      offset: position of its record in the file.
      size: number of bytes of its record.
      seed: seed of the order of the documents.
      split_seed: seed of the choice of groups for the splits.
      quality: score that decides which of two near duplicates is kept; higher is better.
    """
    return (
        offset,
        size,
        len(text.utf8),
        stable_hash(document.id, f"order {seed}"),
        stable_hash(document.group, f"split {split_seed}"),
        stable_hash(document.source, "source"),
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
        quality,
    )


class KeptDocuments:
    """The documents of all pieces, numbered consecutively from 0.

    Attributes:
      folder: the folder of the files.
      starts: (pieces + 1,) int64, the number of the first document of each piece.
    """

    def __init__(self, folder: Path, counts: Sequence[int] | np.ndarray):
        self.folder = folder
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def n_pieces(self) -> int:
        return len(self.starts) - 1

    def index(self, piece: int) -> np.ndarray:
        """Returns the index of a piece, (documents of the piece,) of ``INDEX``."""
        return np.load(self.folder / f"{stem(piece)}.index.npy")

    def column(self, name: str) -> np.ndarray:
        """Returns a field of ``INDEX`` for all documents."""
        columns = [self.index(piece)[name] for piece in range(self.n_pieces)]
        return np.concatenate([np.empty(0, INDEX[name]), *columns])

    def piece_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def records_path(self, piece: int) -> Path:
        return self.folder / f"{stem(piece)}.records"

    def records(self, mask: np.ndarray, piece: int) -> Iterator[tuple[int, bytes]]:
        """Yields (number, record) of the documents of a piece that ``mask`` (all documents,) bool selects."""
        start, stop = self.starts[piece : piece + 2].tolist()
        chosen, index = np.flatnonzero(mask[start:stop]), self.index(piece)
        with self.records_path(piece).open("rb") as stream:
            for row in chosen.tolist():
                offset, size = index["offset"][row].item(), index["size"][row].item()
                if stream.tell() != offset:
                    stream.seek(offset)
                yield start + row, stream.read(size)


class Reader:
    """A context manager that reads single documents of ``KeptDocuments`` by number; consecutive ones are fastest.

    It keeps one file open, and caches the indices of some pieces.
    """

    def __init__(self, kept: KeptDocuments):
        self._kept = kept
        self._index = functools.lru_cache(maxsize=_INDICES)(kept.index)
        self._open: tuple[int, BinaryIO] | None = None

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def entry(self, number: int) -> np.void:
        """Returns the row of ``INDEX`` of a document."""
        piece = self._kept.piece_of(number)
        return self._index(piece)[number - self._kept.starts[piece]]

    def record(self, number: int) -> bytes:
        piece = self._kept.piece_of(number)
        if self._open is None or self._open[0] != piece:
            self.__exit__()
            self._open = piece, self._kept.records_path(piece).open("rb")
        entry = self.entry(number)
        self._open[1].seek(int(entry["offset"]))
        return self._open[1].read(int(entry["size"]))

    def text(self, number: int) -> bytes:
        """Returns the text of a document in UTF-8."""
        return unpack_record(self.record(number))[3]
