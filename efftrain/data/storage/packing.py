"""Documents to one stream of tokens in blocks of fixed size, and back to rows of a batch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from efftrain.data.documents import Document
from efftrain.data.storage.encoding import encode_documents
from efftrain.data.storage.shards import Serializer, Shard, ShardWriter, token_features
from efftrain.data.storage.token_bytes import ByteCounter, byte_level_lengths
from efftrain.data.storage.tokenizer import token_dtype, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Written:
    """The token stream of a split.

    Attributes:
      tokens: in the stream, without the padding of the last block.
      shards: that hold it.
      cut: ids of the documents that were encoded in parts and may have other tokens than as a whole.
    """

    tokens: int
    shards: list[Shard]
    cut: list[str]


def bytes_path(corpus: Path, split: str) -> Path:
    """The bytes per token of a split, where the tokenizer's entries do not tell them: (vocabulary,) float64."""
    return corpus / f"token_bytes-{split}.npy"


def write_tokens(
    corpus: Path,
    split: str,
    tokenizer: "Tokenizer",
    documents: Iterable[Document],
    *,
    end_of_text: str | None,
    block: int,
    shard_bytes: int,
) -> Written:
    """Writes a split's token stream to ``corpus/tokens``, and ``bytes_path`` where it is needed."""
    vocabulary = vocabulary_size(tokenizer)
    dtype = token_dtype(vocabulary)
    serialize = Serializer(token_features(block, dtype))
    writer = ShardWriter(corpus / "tokens", "tokens", split, shard_bytes=shard_bytes)
    counter = ByteCounter(vocabulary) if byte_level_lengths(tokenizer) is None else None
    newest, cut = "", []
    n_tokens = n_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal newest, n_bytes
        for document in documents:
            newest = document.id
            if counter:
                n_bytes += len(document.text.encode())
            yield document.text

    encoded = encode_documents(
        tokenizer,
        texts(),
        end_of_text,
        observe=counter.observe if counter else None,
        on_changed=lambda _: cut.append(newest),
    )
    for tokens in blocks(encoded, block):
        n_tokens += len(tokens)
        padded = np.zeros(block, dtype)
        padded[: len(tokens)] = tokens
        writer.write(serialize({"tokens": padded}))
    if counter:
        np.save(bytes_path(corpus, split), counter.table(n_bytes))
    return Written(n_tokens, writer.finish(), cut)


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


def row(stream: np.ndarray, length: int, *, end_of_text_id: int) -> dict[str, np.ndarray]:
    """One training row from a piece of the token stream.

    Args:
      stream: (up to length + 1,) int32 consecutive tokens; fewer at the end of the stream.
      length: tokens per row.
      end_of_text_id: the token before each document.

    Returns:
      tokens (length,) int32; targets (length,) int32: the next token; segments (length,) int32: 1, 2, ... a document
      or the rest of one, 0 for padding, whose tokens are 0; positions (length,) int32 from 0 in each segment; mask
      (length,) bool: False where there is no next token.
    """
    n_tokens = min(len(stream), length)
    n_targets = max(len(stream) - 1, 0)
    tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens[:n_tokens] = stream[:n_tokens]
    targets[:n_targets] = stream[1:]
    index = np.arange(length, dtype=np.int32)
    begins = tokens == end_of_text_id
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


def padding(length: int) -> dict[str, np.ndarray]:
    """A row in which nothing counts: all arrays of ``row`` are 0 and False."""
    return row(np.empty(0, np.int32), length, end_of_text_id=0)
