"""Packs documents into one stream of tokens in blocks of fixed size, and reads rows of a batch from the stream."""

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
    """Description of the token stream of a split that was written.

    Attributes:
      tokens: number of tokens in the stream, without the padding of the last block.
      shards: the shards that contain the stream.
      cut: ids of the documents that were encoded in parts and may have different tokens for this reason.
    """

    tokens: int
    shards: list[Shard]
    cut: list[str]


def bytes_path(corpus: Path, split: str) -> Path:
    """Returns the file with the bytes per token of a split, (vocabulary,) float64. Byte-level tokenizers need none."""
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
    """Writes the token stream of a split to ``corpus/tokens``, and ``bytes_path`` if the tokenizer needs it.

    Args:
      corpus: the folder of the corpus.
      split: name of the split.
      tokenizer: a tokenizer from ``load_tokenizer`` or ``train_tokenizer``.
      documents: the documents of the split, in order.
      end_of_text: the token between documents. None: the one that ``find_end_of_text`` finds.
      block: number of tokens per record.
      shard_bytes: size in bytes at which a new shard is begun.
    """
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
    """Yields the concatenation of the documents in arrays of ``size`` tokens; the last one may be shorter."""
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
    """Makes one training row from a part of the token stream.

    Args:
      stream: (length + 1,) int32 consecutive tokens, or fewer at the end of the stream.
      length: number of tokens per row.
      end_of_text_id: id of the token before each document.

    Returns:
      A dict of arrays:
        tokens: (length,) int32, 0 for padding.
        targets: (length,) int32, the next token at each position.
        segments: (length,) int32, numbers from 1 for the documents or parts of documents in the row, 0 for padding.
        positions: (length,) int32, counted from 0 in each segment.
        mask: (length,) bool, False where there is no next token.
    """
    n_tokens = min(len(stream), length)
    n_targets = max(len(stream) - 1, 0)
    tokens, targets = np.zeros(length, np.int32), np.zeros(length, np.int32)
    tokens[:n_tokens] = stream[:n_tokens]
    targets[:n_targets] = stream[1:]
    index = np.arange(length, dtype=np.int32)
    begins = tokens == end_of_text_id
    begins[0] = True  # the rest of a document from the previous row is a segment of its own
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
    """Returns a row of padding: the arrays of ``row``, all of which are 0 or False."""
    return row(np.empty(0, np.int32), length, end_of_text_id=0)
