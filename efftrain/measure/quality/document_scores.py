"""Scores every document by its bits per byte under a trained model, for perplexity-based data pruning.

A small reference model is enough to choose the training text of a larger one (Ankner et al. 2024, 2405.20541). The rule
``data.rules.score_table.ScoreTable`` reads the table that this module writes.
"""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from flax import nnx
from jax import Array

from efftrain.data.corpus import Corpus
from efftrain.data.documents import UNREADABLE, Document, Skipped
from efftrain.data.storage.encoding import encode_documents
from efftrain.data.storage.tokenizer import vocabulary_size
from efftrain.errors import ConfigError, CorpusError
from efftrain.lock import Lock, beside
from efftrain.models.decoder import Decoder
from efftrain.ops.cross_entropy import token_nll
from efftrain.ops.fused_linear_loss import choose_chunks, over_chunks
from efftrain.progress import track
from efftrain.train.objectives.objective import Batch
from efftrain.train.run.directory import load
from efftrain.train.run.tokenizers import check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOL_ROWS = 256  # number of rows that are packed together, so that short documents fill the gaps of long ones
_WRITE_ROWS = 4096


@dataclass(frozen=True)
class DocumentScore:
    """The score of one document.

    Attributes:
      id: id of the document.
      bits_per_byte: bits per byte of its text; None if the text is empty.
      n_bytes: bytes of its text in UTF-8.
    """

    id: str
    bits_per_byte: float | None
    n_bytes: int


def score_documents(
    run: Path | str, corpus: Corpus, split: str, out: Path | str, *, length: int | None = None, batch_size: int = 16
) -> int:
    """Scores the documents of a split of a corpus and writes the table; see ``document_scores`` and ``write_scores``.

    Args:
      run: run directory of the model.
      corpus: a corpus of the tokenizer of the run.
      split: name of the split.
      out: the file of the table.
      length, batch_size: see ``document_scores``.

    Returns:
      The number of documents.

    Raises:
      ConfigError: the tokenizer of the corpus is not that of the run.
    """
    check_tokenizer(Path(run), corpus.path)
    scores = document_scores(
        load(run),
        corpus.documents(split),
        corpus.tokenizer(),
        length=length,
        batch_size=batch_size,
        end_of_text=corpus.end_of_text,
    )
    total = corpus.splits[split]["documents"]
    return write_scores(track(scores, f"Scoring {split}", total, unit="documents"), out)


def document_scores(
    model: Decoder,
    documents: Iterable[Document | Skipped],
    tokenizer: "Tokenizer",
    *,
    length: int | None = None,
    batch_size: int = 16,
    end_of_text: str | None = None,
) -> Iterator[DocumentScore]:
    """Yields the score of each document, in the order of the documents.

    A document is read from its beginning, after an end-of-text token, in consecutive windows of ``length`` tokens; the
    first token of a window is predicted from the last token of the window before. The nats of all tokens of the
    document are summed, without those of the end of the text. Other documents in the same row or batch have no
    influence on a score. Documents that a source skips, and text that is not valid Unicode (half a surrogate pair), get
    no score, because they never become part of a corpus.

    Args:
      model: the model, for example from ``efftrain.load``, in a single process.
      documents: documents of a corpus, or of a source before anything was removed.
      tokenizer: the tokenizer that the model was trained with.
      length: tokens per window and row. None: the model's ``max_length``.
      batch_size: rows per step.
      end_of_text: the token before each document. None: the one that ``find_end_of_text`` finds.

    Raises:
      ConfigError: the tokenizer does not belong to the model, or ``length`` or ``batch_size`` is impossible.
      CorpusError: a file of the source cannot be read to its end.
    """
    length = model.config.max_length if length is None else length
    if not 1 <= length <= model.config.max_length:
        raise ConfigError(f"length is {length}; it must be from 1 to the model's max_length {model.config.max_length}")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be at least 1")
    if vocabulary_size(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary_size(tokenizer)} entries and model.vocab_size is "
            f"{model.config.vocab_size}; use the tokenizer of the corpus that the model was trained on"
        )
    return _document_scores(model, _encoded(documents, tokenizer, end_of_text), length, batch_size)


def _document_scores(
    model: Decoder, encoded: Iterable["Encoded"], length: int, batch_size: int
) -> Iterator[DocumentScore]:
    graph, state = nnx.split(model)
    for pool in _pools(encoded, POOL_ROWS * length):
        nats = np.zeros(len(pool))
        streams = [tokens for _, _, tokens in pool]
        pending = None
        for batch, owners in _batches(streams, length, batch_size):
            dispatched = _target_nats(graph, state, batch), owners
            # The sums are read one batch late, so that the device works on this batch meanwhile.
            _add(nats, pending)
            pending = dispatched
        _add(nats, pending)
        for (id, n_bytes, _), total in zip(pool, nats, strict=True):
            id = id.encode(errors="replace").decode()  # a badly encoded file name, as the corpus would keep it
            yield DocumentScore(id, float(total) / math.log(2) / n_bytes if n_bytes else None, n_bytes)


def write_scores(scores: Iterable[DocumentScore], out: Path | str) -> int:
    """Writes a Parquet table of ``id``, ``bits_per_byte`` and ``n_bytes``; the file appears when it is complete.

    Returns:
      The number of rows.

    Raises:
      InUseError: another process is writing the table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    incomplete = out.with_name(f"{out.name}.incomplete")
    schema = pa.schema([("id", pa.string()), ("bits_per_byte", pa.float32()), ("n_bytes", pa.int64())])
    n_rows = 0
    with Lock(beside(out), out), pq.ParquetWriter(incomplete, schema, compression="zstd") as writer:
        scores = iter(scores)
        while rows := [vars(score) for score in itertools.islice(scores, _WRITE_ROWS)]:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            n_rows += len(rows)
    os.replace(incomplete, out)
    return n_rows


Encoded = tuple[str, int, np.ndarray]  # id, bytes of text, and the tokens after an end of text
Window = tuple[int, int, int]  # index of the stream, first token, number of tokens


def _encoded(
    documents: Iterable[Document | Skipped], tokenizer: "Tokenizer", end_of_text: str | None
) -> Iterator[Encoded]:
    # The tokenizer reads ahead in batches of documents; ``tee`` holds the documents in between.
    sized, texts = itertools.tee(_sized(documents))
    for (document, n_bytes), tokens in zip(
        sized, encode_documents(tokenizer, (document.text for document, _ in texts), end_of_text), strict=True
    ):
        yield document.id, n_bytes, tokens


def _sized(documents: Iterable[Document | Skipped]) -> Iterator[tuple[Document, int]]:
    for document in documents:
        if isinstance(document, Document):
            try:
                n_bytes = len(document.text.encode())
            except UnicodeEncodeError:
                continue
            yield document, n_bytes
        elif document.rule == UNREADABLE:
            raise CorpusError(
                f"{document.id} of {document.source} cannot be read ({document.detail}), so that an unknown "
                "number of documents would have no score; repair the file, or remove it from the source"
            )


def _pools(encoded: Iterable[Encoded], n_tokens: int) -> Iterator[list[Encoded]]:
    """Groups whole documents into pools of at least ``n_tokens`` tokens."""
    pool: list[Encoded] = []
    held = 0
    for item in encoded:
        pool.append(item)
        held += len(item[2])
        if held >= n_tokens:
            yield pool
            pool, held = [], 0
    if pool:
        yield pool


def pack_windows(sizes: Iterable[int], length: int) -> list[list[Window]]:
    """Cuts streams into windows and packs the windows into rows (best fit, longest window first).

    Args:
      sizes: number of targets of each stream.
      length: size of a row, and of the longest window.

    Returns:
      The windows (stream, start, size) of each row.
    """
    windows = [
        (stream, start, min(length, size - start))
        for stream, size in enumerate(sizes)
        for start in range(0, size, length)
    ]
    rows: list[list[Window]] = []
    with_room: list[list[int]] = [[] for _ in range(length + 1)]  # free tokens -> rows
    for window in sorted(windows, key=lambda window: -window[2]):
        free = next((free for free in range(window[2], length) if with_room[free]), None)
        number = len(rows) if free is None else with_room[free].pop()
        if free is None:
            rows.append([])
            free = length
        rows[number].append(window)
        with_room[free - window[2]].append(number)
    return rows


def _batches(streams: list[np.ndarray], length: int, batch_size: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches of arrays (batch_size, length), with the index of the stream of each target; -1 at padding."""
    rows = pack_windows([len(stream) - 1 for stream in streams], length)
    for first in range(0, len(rows), batch_size):
        shape = batch_size, length
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        owners = np.full(shape, -1)
        for i, row in enumerate(rows[first : first + batch_size]):
            place = 0
            for segment, (stream, start, size) in enumerate(row, start=1):
                here = slice(place, place + size)
                tokens[i, here] = streams[stream][start : start + size]
                targets[i, here] = streams[stream][start + 1 : start + size + 1]
                segments[i, here], owners[i, here] = segment, stream
                positions[i, here] = np.arange(size)
                place += size
        yield {"tokens": tokens, "targets": targets, "segments": segments, "positions": positions}, owners


def _add(nats: np.ndarray, computed: tuple[Array, np.ndarray] | None) -> None:
    """Adds the nats of a batch's targets to the sums of their streams, in float64."""
    if computed is not None:
        target_nats, owners = computed
        real = owners >= 0
        nats += np.bincount(owners[real], np.asarray(target_nats)[real], minlength=len(nats))


@partial(jax.jit, static_argnums=0)
def _target_nats(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> Array:
    """Nats of each target, (batch, length) float32, in chunks, so that the logits never exist all at once."""
    model = nnx.merge(graph, state)
    hidden_btd, _ = model.hidden(batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"])

    def chunk(carry: None, arrays: tuple[Array, Array]) -> tuple[None, Array]:
        hidden, targets = arrays
        return carry, token_nll(model.logits(hidden), targets)

    n_rows, length = batch["tokens"].shape
    n_chunks = choose_chunks(length, n_rows * length * model.config.vocab_size)
    return over_chunks(chunk, None, (hidden_btd, batch["targets"]), n_chunks)[1]
