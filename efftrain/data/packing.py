"""Documents to one stream of tokens in blocks of fixed size, and back to rows of a batch."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from efftrain.data.shards import Serializer, Shard, ShardWriter, token_features
from efftrain.data.tokenizer import END_OF_TEXT_ID, encode_documents, token_dtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def write_tokens(
    folder: Path, split: str, tokenizer: "Tokenizer", texts: Iterable[str], *, block: int, shard_bytes: int
) -> tuple[int, list[Shard]]:
    """Writes a split's token stream.

    Returns:
      The number of tokens, without the padding of the last block, and the shards.
    """
    dtype = token_dtype(tokenizer.get_vocab_size())
    serialize = Serializer(token_features(block, dtype))
    writer = ShardWriter(folder, "tokens", split, shard_bytes=shard_bytes)
    n_tokens = 0
    for tokens in blocks(encode_documents(tokenizer, texts), block):
        n_tokens += len(tokens)
        padded = np.zeros(block, dtype)
        padded[: len(tokens)] = tokens
        writer.write(serialize({"tokens": padded}))
    return n_tokens, writer.finish()


def blocks(documents: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cuts the concatenation of the documents into arrays of ``size``; the last one may be shorter."""
    held: list[np.ndarray] = []
    n_held = 0
    for document in documents:
        held.append(document)
        n_held += len(document)
        if n_held < size:
            continue
        stream = np.concatenate(held)
        whole = n_held - n_held % size
        yield from stream[:whole].reshape(-1, size)
        held, n_held = [stream[whole:]], n_held - whole
    if n_held:
        yield np.concatenate(held)


def row(stream: np.ndarray, length: int) -> dict[str, np.ndarray]:
    """One training row from a piece of the token stream.

    Args:
      stream: (up to length + 1,) int32 consecutive tokens; fewer at the end of the stream, none for a row of padding.
      length: tokens per row.

    Returns:
      tokens (length,) int32; targets (length,) int32: the next token; segments (length,) int32: 1, 2, ... a document
      or the rest of one, 0 for padding; positions (length,) int32 from 0 in each segment; mask (length,) bool: False
      where there is no next token.
    """
    n_tokens = min(len(stream), length)
    n_targets = max(len(stream) - 1, 0)
    tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens[:n_tokens] = stream[:n_tokens]
    targets[:n_targets] = stream[1:]
    index = np.arange(length, dtype=np.int32)
    begins = tokens == END_OF_TEXT_ID
    begins[0] = True  # what goes on from the row before is a segment of its own
    real = index < n_tokens
    segments = np.where(real, np.cumsum(begins, dtype=np.int32), np.int32(0))
    starts = np.maximum.accumulate(np.where(begins, index, 0))
    return {
        "tokens": tokens,
        "targets": targets,
        "segments": segments,
        "positions": np.where(real, index - starts, 0).astype(np.int32),
        "mask": index < n_targets,
    }
