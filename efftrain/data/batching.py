"""Groups texts into batches that fit into the processor's cache and are large enough to make a call worthwhile."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T", str, bytes)


def by_size(texts: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of consecutive texts, each with a total length of at least ``size``; the last may be shorter.

    Args:
      texts: strings or bytes.
      size: total length at which a list is complete, in characters or bytes.
    """
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
