"""Filters documents by scores that were computed before, such as the perplexity under a small model.

The best range depends on the corpus, and neither end of the scale is always the bad one: Marion et al. 2023
(2309.04564) keep the middle of the perplexities, and Ankner et al. 2024 (2405.20541) the middle or the top half.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from efftrain.data.documents import Text
from efftrain.data.rules.base import Between
from efftrain.data.stages.spool import stable_hash
from efftrain.data.storage.shards import file_digest
from efftrain.errors import ConfigError, CorpusError


@dataclass(frozen=True, kw_only=True)
class ScoreTable(Between):
    """Keeps documents whose score in a Parquet table is from ``low`` to ``high``. Create it with ``ScoreTable.load``.

    Score: the number in ``column`` of the row with the ``id`` of the document, rounded to float32. A null becomes nan,
    and the document is not kept. The table is read once per process and takes 12 bytes per document.

    Attributes:
      low: lowest score at which a document is kept.
      high: highest score at which a document is kept.
      table: the Parquet file, with a column ``id`` of strings.
      digest: digest of the content of the file, so that scores of another table are never reused.
      column: the column of scores.

    Raises:
      CorpusError: (by ``score``) the table is missing, damaged or has changed, or has no row for the document.
    """

    table: Path
    digest: str
    column: str = "bits_per_byte"

    @property
    def name(self) -> str:  # ty: ignore[incompatible-property-override]  # read only, as every rule's name
        """The name of the rule. It has the column, so that a list of rules may use several columns."""
        return f"score_table/{self.column}"

    @classmethod
    def load(
        cls,
        table: Path | str,
        *,
        column: str = "bits_per_byte",
        low: float = float("-inf"),
        high: float = float("inf"),
    ) -> "ScoreTable":
        """Creates the rule for the present content of a table; by default every score except nan is kept."""
        table = Path(table)
        return cls(table=table, digest=_digest(table), column=column, low=low, high=high)

    def score(self, text: Text) -> float:
        hashes, scores = _checked_scores(self.table, self.column, self.digest)
        hashed = _hash(text.id)
        place = int(np.searchsorted(hashes, np.uint64(hashed)))
        if place == len(hashes) or hashes[place] != hashed:
            raise CorpusError(
                f"{self.table} has no score of document {text.id!r}; score the same documents that the rule judges"
            )
        return float(scores[place])


def quantile_thresholds(table: Path | str, column: str, low: float, high: float) -> tuple[float, float]:
    """Converts quantiles of the scores in a table to values for ``low`` and ``high`` of a ``ScoreTable``.

    Args:
      table: the Parquet file.
      column: the column of scores.
      low, high: quantiles from 0 to 1: (0.25, 0.75) keeps the middle half, (0.5, 1) the upper half.

    Raises:
      ConfigError: ``low`` and ``high`` are not a range.
      CorpusError: the table is missing or damaged, or has no scores.
    """
    if not 0 <= low < high <= 1:
        raise ConfigError(f"quantiles low {low} and high {high} are not a range; use 0 <= low < high <= 1")
    scores = _read(Path(table), column)[1]
    scores = scores[~np.isnan(scores)].astype(np.float64)
    if not len(scores):
        raise CorpusError(f"{table} has no score in column {column!r}; score some documents first")
    return float(np.quantile(scores, low)), float(np.quantile(scores, high))


@lru_cache(maxsize=8)
def _checked_scores(table: Path, column: str, digest: str) -> tuple[np.ndarray, np.ndarray]:
    if (found := _digest(table)) != digest:
        raise CorpusError(
            f"{table} is not the table the rule was made with (expected {digest[:8]}.., found {found[:8]}..); "
            "make the rule again with ScoreTable.load"
        )
    return _read(table, column)


def _read(table: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the hashes of the ids, (n,) uint64, ascending, and their scores, (n,) float32."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    hashes, scores = [np.empty(0, np.uint64)], [np.empty(0, np.float32)]
    try:
        with pq.ParquetFile(table) as file:
            if missing := [c for c in ("id", column) if c not in file.schema_arrow.names]:
                raise CorpusError(f"{table} has no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(columns=["id", column]):
                ids = batch.column("id").to_pylist()
                hashes.append(np.fromiter(map(_hash, ids), np.uint64, len(ids)))
                scores.append(batch.column(column).cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False))
    except (OSError, pa.ArrowException) as error:
        raise CorpusError(f"{table} cannot be read ({error}); score the documents again") from error
    except AttributeError as error:
        raise CorpusError(f"the column 'id' of {table} does not hold strings; write the ids as strings") from error
    joined = np.concatenate(hashes)
    order = np.argsort(joined, kind="stable")
    joined = joined[order]
    if (repeats := int((joined[1:] == joined[:-1]).sum())) > 0:
        raise CorpusError(f"{table} has {repeats:,} repeated ids; give every document a unique id")
    return joined, np.concatenate(scores)[order]


def _digest(table: Path) -> str:
    try:
        return file_digest(table)
    except OSError as error:
        raise CorpusError(f"{table} cannot be read ({error.strerror}); score the documents first") from error


def _hash(id: str) -> int:
    # An unpaired surrogate, as in the name of a badly encoded file, cannot be stored in a table and was replaced there.
    return stable_hash(id.encode(errors="replace").decode(), "score table")
