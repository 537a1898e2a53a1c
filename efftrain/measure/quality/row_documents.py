"""Assigns the tokens of rows to documents, and turns figures of tokens into a loss per document.

The tokens of a document resemble each other, and so do the rows that contain it. Statistics that need independent
samples must therefore take documents as samples.
"""

from collections.abc import Mapping, Sequence

import numpy as np

Rows = Sequence[Mapping[str, np.ndarray]]  # batches of arrays (batch, length)


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
    """Adds ``documents``, (batch, length), to batches of consecutive rows; see ``document_numbers``."""
    tokens, segments = (np.concatenate([row[name] for row in rows]) for name in ("tokens", "segments"))
    numbers = document_numbers(tokens, segments, end_of_text_id)
    ends = np.cumsum([len(row["tokens"]) for row in rows])[:-1]
    return [{**row, "documents": part} for row, part in zip(rows, np.split(numbers, ends), strict=True)]


def after_tuning(rows: Rows, n_tuning: int) -> list[dict[str, np.ndarray]]:
    """The batches after the first ``n_tuning``; documents that began in these first ones get -1, like padding."""
    tuned = max(row["documents"].max() for row in rows[:n_tuning])
    return [{**r, "documents": np.where(r["documents"] > tuned, r["documents"], -1)} for r in rows[n_tuning:]]


def losses_by_document(differs: np.ndarray, counted: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """For each document with counted tokens, the share of these tokens that differ.

    Args:
      differs: bool, any shape.
      counted: bool of the same shape, True for tokens that count.
      documents: integers of the same shape, the number of each token's document; tokens with -1 do not count.

    Returns:
      (documents,) float64.
    """
    counted = counted & (documents >= 0)
    numbers = documents[counted]
    sizes = np.bincount(numbers)
    sums = np.bincount(numbers, differs[counted].astype(np.float64), minlength=len(sizes))
    return sums[sizes > 0] / sizes[sizes > 0]


def count_documents(rows: Rows) -> int:
    """Number of documents with at least one token that counts."""
    mask, documents = (np.concatenate([row[name] for row in rows]) for name in ("mask", "documents"))
    return len(losses_by_document(mask, mask, documents))
