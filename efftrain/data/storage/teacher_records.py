"""Encodes and decodes the records of a teacher cache: a teacher's next-token distributions for one row, as bytes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from efftrain.data.storage.tokenizer import token_dtype
from efftrain.errors import ConfigError

SHARD_ROWS, MAX_SHARDS = 256, 256  # an interrupted build loses less than a shard; a reader keeps all shards open
DIGEST_BYTES = 16
MAX_SAMPLES = 255  # counts are stored in one byte

Kind = Literal["top_k", "sampled"]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The parameters that determine the content of a cache, independently of its path.

    Attributes:
      kind: "top_k": the largest probabilities at each position, the remaining mass being one number; "sampled": samples
        from the whole distribution (Anshumann et al. 2025, Sparse Logit Sampling), an unbiased estimate of it.
      n: number of probabilities, or of samples with replacement, at each position.
      seed: seed of the samples; None for "top_k".
      vocab_size: number of entries of the tokenizer, over which the distributions are defined.
      teacher: ``train.inputs.model_digest`` of the model.
      corpus: ``Corpus.token_fingerprint`` of the corpus.
      tokenizer: checksum of the ``tokenizer.json`` of the corpus.
      split: the split of the corpus.
      length: number of tokens per row.
      rows: number of rows at the beginning of the split.
    """

    kind: Kind
    n: int
    seed: int | None
    vocab_size: int
    teacher: str
    corpus: str
    tokenizer: str
    split: str
    length: int
    rows: int

    def __post_init__(self):
        most = self.vocab_size if self.kind == "top_k" else MAX_SAMPLES
        if not 1 <= self.n <= most:
            option = "--top-k" if self.kind == "top_k" else "--samples"
            raise ConfigError(f"{option} is {self.n}; give a number from 1 to {most}")

    @property
    def shard_rows(self) -> int:
        return max(SHARD_ROWS, -(-self.rows // MAX_SHARDS))

    def shards(self) -> list[tuple[str, range]]:
        """Returns the name of each shard and the numbers of its rows."""
        starts = range(0, self.rows, self.shard_rows)
        rows = [range(start, min(start + self.shard_rows, self.rows)) for start in starts]
        return [(f"{self.split}-{number:05d}.array_record", r) for number, r in enumerate(rows)]

    @property
    def id_dtype(self) -> np.dtype:
        return np.dtype(token_dtype(self.vocab_size)).newbyteorder("<")


def row_digest(row: Mapping[str, np.ndarray]) -> bytes:
    """Returns a 16-byte digest of what a model reads of a row: its length, tokens and segments."""
    read = np.stack([row["tokens"], row["segments"]]).astype("<i4")
    return hashlib.blake2b(read.tobytes(), digest_size=DIGEST_BYTES).digest()


def encode_top_k(plan: CachePlan, row: Mapping[str, np.ndarray], ids_tk: np.ndarray, log_probs_tk: np.ndarray) -> bytes:
    """Encodes a record of kind "top_k".

    Args:
      plan: the plan of the cache.
      row: the row, see ``packing.row``.
      ids_tk: (length, k) integers, the tokens in order of descending probability.
      log_probs_tk: (length, k) float, the logarithms of their probabilities.
    """
    valid_t1 = row["segments"][:, None] > 0
    ids_tk = np.where(valid_t1, ids_tk, 0).astype(plan.id_dtype)
    log_probs_tk = np.where(valid_t1, log_probs_tk, -np.inf).astype("<f2")
    return row_digest(row) + ids_tk.tobytes() + log_probs_tk.tobytes()


def encode_sampled(plan: CachePlan, row: Mapping[str, np.ndarray], samples_tn: np.ndarray) -> bytes:
    """Encodes a record of kind "sampled".

    Args:
      plan: the plan of the cache.
      row: the row, see ``packing.row``.
      samples_tn: (length, n) integers, the sampled tokens in any order.
    """
    valid_t = row["segments"] > 0
    sorted_rn = np.sort(samples_tn[valid_t], axis=1)
    first_rn = np.ones(sorted_rn.shape, bool)
    first_rn[:, 1:] = sorted_rn[:, 1:] != sorted_rn[:, :-1]
    starts = np.flatnonzero(first_rn)  # starts of runs of equal tokens; a run never continues in the next position
    counts = np.diff(starts, append=sorted_rn.size).astype(np.uint8)
    n_entries_t = np.zeros(plan.length, np.uint8)
    n_entries_t[valid_t] = first_rn.sum(axis=1)
    ids = sorted_rn.ravel()[starts].astype(plan.id_dtype)
    return row_digest(row) + n_entries_t.tobytes() + ids.tobytes() + counts.tobytes()


def decode(plan: CachePlan, record: bytes, width: int) -> tuple[bytes, Arrays]:
    """Decodes a record of either kind.

    Args:
      plan: the plan of the cache.
      record: the result of ``encode_top_k`` or ``encode_sampled``.
      width: number of entries per position in the result, at least the largest number that any position has.

    Returns:
      The digest of the row, and its arrays as ``TeacherCache.read`` returns them.

    Raises:
      ValueError: the size of the record does not match its content.
    """
    body, id_bytes = memoryview(record)[DIGEST_BYTES:], plan.id_dtype.itemsize
    taught = no_teacher(plan.length, width)
    if plan.kind == "top_k":
        split = plan.length * plan.n * id_bytes
        shape = plan.length, plan.n
        taught["teacher_ids"][:, : plan.n] = np.frombuffer(body[:split], plan.id_dtype).reshape(shape)
        probs_tk = np.exp(np.frombuffer(body[split:], "<f2").reshape(shape).astype(np.float32))
        # Rounding to float16 must not make the sum of the probabilities exceed 1.
        taught["teacher_probs"][:, : plan.n] = probs_tk / np.maximum(probs_tk.sum(axis=1, keepdims=True), 1)
    else:
        used_tw = np.arange(width) < np.frombuffer(body[: plan.length], np.uint8)[:, None]
        split = plan.length + int(used_tw.sum()) * id_bytes
        counts = np.frombuffer(body[split:], np.uint8)
        taught["teacher_ids"][used_tw] = np.frombuffer(body[plan.length : split], plan.id_dtype)
        taught["teacher_probs"][used_tw] = counts.astype(np.float32) / np.float32(plan.n)
    return bytes(record[:DIGEST_BYTES]), taught


def no_teacher(length: int, width: int) -> Arrays:
    """Returns the arrays of a teacher for a row of padding."""
    shape = length, width
    return {"teacher_ids": np.zeros(shape, np.int32), "teacher_probs": np.zeros(shape, np.float32)}
