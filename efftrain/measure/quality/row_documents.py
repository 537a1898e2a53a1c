"""Which documents the rows of a corpus are of, and what is measured of tokens as a loss of each document.

The tokens of a document are alike, and so are the rows that it goes through: where samples must be independent, the
sample is a document.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Rows = Sequence[Mapping[str, np.ndarray]]  # batches of (batch, length)


def document_numbers(tokens_bt: np.ndarray, segments_bt: np.ndarray, end_of_text_id: int) -> np.ndarray:
    """The number of the document that each token belongs to, for consecutive rows of a token stream.

    Args:
      tokens_bt, segments_bt: (rows, length) integers, see ``data.storage.packing.row``.
      end_of_text_id: the token before each document.

    Returns:
      (rows, length) int: 0 for the document that began before the first row, then 1, 2, ...; -1 for padding.
    """
    valid_bt = segments_bt != 0
    begins = (tokens_bt == end_of_text_id) & valid_bt
    return np.where(valid_bt, np.cumsum(begins).reshape(begins.shape), -1)


def with_documents(rows: Rows, end_of_text_id: int) -> list[dict[str, np.ndarray]]:
    """Batches of consecutive rows with ``documents``, (batch, length): see ``document_numbers``."""
    tokens, segments = (np.concatenate([row[name] for row in rows]) for name in ("tokens", "segments"))
    numbers = document_numbers(tokens, segments, end_of_text_id)
    ends = np.cumsum([len(row["tokens"]) for row in rows])[:-1]
    return [{**row, "documents": part} for row, part in zip(rows, np.split(numbers, ends), strict=True)]


def after_tuning(rows: Rows, n_tuning: int) -> list[dict[str, np.ndarray]]:
    """The batches after the first ``n_tuning``; a document that began in those is -1 in ``documents``, like padding."""
    tuned = max(row["documents"].max() for row in rows[:n_tuning])
    return [{**r, "documents": np.where(r["documents"] > tuned, r["documents"], -1)} for r in rows[n_tuning:]]


def losses_by_document(differs: np.ndarray, counted: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """(documents,) float64: the share of each document's counted tokens that differ; of those that have any.

    Args:
      differs: bool.
      counted: bool of the same shape, which tokens count.
      documents: of the same shape, the number of each token's document; tokens of -1 do not count.
    """
    counted = counted & (documents >= 0)
    numbers = documents[counted]
    sizes = np.bincount(numbers)
    sums = np.bincount(numbers, differs[counted].astype(np.float64), minlength=len(sizes))
    return sums[sizes > 0] / sizes[sizes > 0]


def count_documents(rows: Rows) -> int:
    """Documents of which a token counts."""
    mask, documents = (np.concatenate([row[name] for row in rows]) for name in ("mask", "documents"))
    return len(losses_by_document(mask, mask, documents))
