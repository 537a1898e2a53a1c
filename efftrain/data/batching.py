"""Texts in batches that are small enough for the cache and large enough to be worth a call."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", str, bytes)


def by_size(texts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of consecutive texts, each closed when its lengths add up to ``size``; the last may be smaller."""
    batch: list[T] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
