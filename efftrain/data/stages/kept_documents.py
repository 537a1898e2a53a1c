"""The documents that the first stage kept, as files that all later stages read.

A piece has NNNNNN.records, its documents one after the other (see ``spool``), and NNNNNN.index.npy, (documents,) of
``INDEX``. Nothing is mapped or left open between two calls but by a ``Reader``, which closes what it opened.
"""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from efftrain.data.documents import Document, Text
from efftrain.data.stages.spool import stable_hash, unpack_record
from efftrain.data.stages.stage import stem

INDEX = np.dtype(
    [
        ("offset", "<u8"),  # of the record in its file
        ("size", "<u8"),  # of the record
        ("n_bytes", "<u8"),  # of the text
        ("order", "<u8"),  # hash of the id that decides the place in the corpus
        ("group", "<u8"),  # hash of the package
        ("source", "<u8"),  # hash of the source
        ("digest_high", "<u8"),  # of the normalised text
        ("digest_low", "<u8"),
        ("quality", "<f4"),  # of two duplicates the one with the larger is kept
    ]
)
_INDICES = 64  # pieces whose index a reader holds


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
    """A row of ``INDEX`` for a document whose record of ``size`` bytes begins at ``offset``; the digest is
    ``dedup.exact.text_digest``."""
    return (
        offset,
        size,
        len(text.utf8),
        stable_hash(document.id, f"order {seed}"),
        stable_hash(document.package, f"split {split_seed}"),
        stable_hash(document.source, "source"),
        int.from_bytes(digest[:8], "little"),
        int.from_bytes(digest[8:], "little"),
        quality,
    )


class KeptDocuments:
    """Documents numbered from 0 through all pieces.

    Attributes:
      folder: of the files.
      starts: (pieces + 1,) int64, the number of the first document of each piece.
    """

    def __init__(self, folder: Path, counts: Sequence[int]):
        self.folder = folder
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def n_pieces(self) -> int:
        return len(self.starts) - 1

    def index(self, piece: int) -> np.ndarray:
        """(documents of the piece,) of INDEX."""
        return np.load(self.folder / f"{stem(piece)}.index.npy")

    def column(self, name: str) -> np.ndarray:
        """A field of INDEX for all documents."""
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
    """Single documents of ``KeptDocuments`` by their number; neighbours are fastest. A context manager.

    One file and the indices of some pieces are held.
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
        """One row of INDEX."""
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
        """The text of one document in UTF-8."""
        return unpack_record(self.record(number))[3]
