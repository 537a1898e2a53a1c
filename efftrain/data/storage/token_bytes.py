"""How many bytes of text each token stands for, for bits per byte, and how much of a text its tokens give back.

A byte-level BPE writes each byte as one character of its entries, so that their lengths are the bytes. Of any other
tokenizer the bytes are counted in the text, when the tokens of a split are written: each token stands for the text up
to its end from the end of the token before. An entry gets its mean over the split, so that all tokens of the split
together have exactly the bytes of its documents, and those of some rows nearly the bytes of their text.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.data.storage.tokenizer import find_end_of_text, text_encoder, token_dtype, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_DOCUMENTS, _CHARS = 200, 5000  # of a sample that is decoded again


def byte_level_lengths(tokenizer: "Tokenizer") -> np.ndarray | None:
    """(vocabulary,) int32: the bytes of text of each token, 0 for special tokens. None: it is not lossless byte-level.

    Lossless are a BPE with an entry for every byte, byte-level pre-tokenization and decoding, and nothing that changes
    a text before.
    """
    from tokenizers import pre_tokenizers

    content = json.loads(tokenizer.to_str())
    added = tokenizer.get_added_tokens_decoder()
    entries = tokenizer.get_vocab()
    lossless = (
        content["model"]["type"] == "BPE"
        and content["normalizer"] is None
        and _keeps_bytes(content["pre_tokenizer"])
        and (content["decoder"] or {}).get("type") == "ByteLevel"
        and all(byte in entries for byte in pre_tokenizers.ByteLevel.alphabet())
        and not any((token.lstrip or token.rstrip) and not token.special for token in added.values())
    )
    if not lossless:
        return None
    lengths = np.zeros(vocabulary_size(tokenizer), np.int32)
    for token, number in entries.items():
        lengths[number] = len(token)
    for number, token in added.items():
        lengths[number] = 0 if token.special else len(token.content.encode())  # as it stands in the text
    return lengths


class ByteCounter:
    """Counts the bytes of text that the tokens of a split stand for; ``observe`` is for ``encode_documents``."""

    def __init__(self, vocabulary: int):
        self._bytes_v, self._tokens_v = np.zeros(vocabulary), np.zeros(vocabulary)

    def observe(self, text: str, encoding: "Encoding") -> None:
        ids = np.array(encoding.ids, np.int64)
        if not len(ids):
            return  # a text of characters that the tokenizer drops
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(sizes)])
        ends = np.maximum.accumulate(np.array(encoding.offsets, np.int64)[:, 1])
        ends[-1] = len(text)  # what is dropped at the end belongs to the last token
        spans = np.diff(bytes_before[ends], prepend=0)
        self._bytes_v += np.bincount(ids, spans, len(self._bytes_v))
        self._tokens_v += np.bincount(ids, minlength=len(self._tokens_v))

    def table(self, n_bytes: int) -> np.ndarray:
        """(vocabulary,) float64 bytes per token, which sum up to ``n_bytes`` over all tokens that were observed.

        An entry that does not occur has 0 bytes.
        """
        mean_v = self._bytes_v / np.maximum(self._tokens_v, 1)
        return mean_v * (n_bytes / self._bytes_v.sum() if self._bytes_v.any() else 1.0)


@dataclass(frozen=True)
class RoundTrip:
    """What decoding gives back of a sample of documents.

    Attributes:
      documents: in the sample; of long ones the beginning.
      changed: those that do not come back as they are.
      lost: share of their bytes whose characters do not come back: they are dropped, replaced or unknown.
    """

    documents: int
    changed: int
    lost: float


def describe_tokenizer(tokenizer: "Tokenizer", end_of_text: str | None, texts: Iterable[str]) -> dict[str, Any]:
    """What a corpus's manifest says of its tokenizer: ``lossless`` and ``lost`` are of a sample of the texts."""
    vocabulary, end_of_text = vocabulary_size(tokenizer), find_end_of_text(tokenizer, end_of_text)
    found = round_trip(tokenizer, texts)
    return {
        "vocabulary": vocabulary,
        "dtype": np.dtype(token_dtype(vocabulary)).name,
        "end_of_text": end_of_text,
        "end_of_text_id": tokenizer.token_to_id(end_of_text),
        "lossless": not found.changed,
        "lost": found.lost,
    }


def round_trip(tokenizer: "Tokenizer", texts: Iterable[str]) -> RoundTrip:
    """Encodes and decodes the beginnings of the first texts."""
    encoder, unknown = text_encoder(tokenizer), _unknown(tokenizer)
    n_documents = n_changed = n_bytes = n_lost = 0
    for text in (text[:_CHARS] for text in islice(texts, _DOCUMENTS)):
        ids = [i for i in encoder.encode(text, add_special_tokens=False).ids if i != unknown]
        decoded = encoder.decode(ids, skip_special_tokens=False)
        n_documents += 1
        n_changed += decoded != text
        n_bytes += len(text.encode())
        if decoded != text:
            n_lost += len("".join((Counter(text) - Counter(decoded)).elements()).encode())
    return RoundTrip(n_documents, n_changed, n_lost / max(n_bytes, 1))


def _keeps_bytes(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether a pre-tokenizer gives all bytes of a text to the model and adds none: byte-level, after splits."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *splits, last = (step or {"type": None} for step in steps)
    cuts_only = all(
        step["type"] == "Digits" or (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed")
        for step in splits
    )
    return cuts_only and last["type"] == "ByteLevel" and not last["add_prefix_space"]


def _unknown(tokenizer: "Tokenizer") -> int | None:
    """The id of text that the tokenizer does not know; None where it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
