"""Computes the bytes of text per token, for bits per byte, and the share of a text that decoding its tokens restores.

A byte-level BPE represents each byte as one character of an entry, so that the length of an entry is its number of
bytes. For any other tokenizer, bytes are counted in the text when the tokens of a split are written: a token covers the
text from the end of the previous token to its own end. Each entry gets its mean over the split, so that all tokens of
the split together have exactly as many bytes as its documents, and the tokens of a few rows nearly as many as their
text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.data.storage.tokenizer import find_end_of_text, text_encoder, token_dtype, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

_DOCUMENTS, _CHARS = 200, 5000  # number of documents, and of characters of each, that are encoded and decoded


def byte_level_lengths(tokenizer: "Tokenizer") -> np.ndarray | None:
    """Returns the bytes of text per token of a lossless byte-level tokenizer, or None for any other tokenizer.

    A tokenizer is lossless if it is a BPE with an entry for every byte, with byte-level pre-tokenization and decoding,
    and without a normalizer or another step that changes the text.

    Returns:
      (vocabulary,) int32, 0 for special tokens; or None.
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
        lengths[number] = 0 if token.special else len(token.content.encode())  # added tokens are not byte-level
    return lengths


def covered_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns the bytes of a text in UTF-8 that each of its tokens covers, from the end of the one before to its own.

    Args:
      text: the text.
      offsets: first character of each token, and the one after its last. Text that a tokenizer drops at the end
        belongs to the last token.

    Returns:
      (tokens,) int64, which sum to the bytes of the text if there is a token.
    """
    if not len(offsets):
        return np.zeros(0, np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    ends = np.maximum.accumulate(np.array(offsets, np.int64)[:, 1])
    ends[-1] = len(text)
    return np.diff(bytes_before[ends], prepend=0)


class ByteCounter:
    """Counts the bytes of text that the tokens of a split cover. Pass ``observe`` to ``encode_documents``."""

    def __init__(self, vocabulary: int):
        self._bytes_v, self._tokens_v = np.zeros(vocabulary), np.zeros(vocabulary)

    def observe(self, text: str, encoding: "Encoding") -> None:
        self.add(np.array(encoding.ids, np.int64), covered_bytes(text, encoding.offsets))

    def add(self, ids: np.ndarray, n_bytes: np.ndarray) -> None:
        """Counts tokens, (n,) ids with the bytes that each covers."""
        self._bytes_v += np.bincount(ids, n_bytes, len(self._bytes_v))
        self._tokens_v += np.bincount(ids, minlength=len(self._tokens_v))

    def means(self) -> np.ndarray:
        """Returns the mean bytes of each token, (vocabulary,) float64; entries that do not occur have 0."""
        return self._bytes_v / np.maximum(self._tokens_v, 1)

    def table(self, n_bytes: int) -> np.ndarray:
        """Returns the bytes per token, (vocabulary,) float64, which sum to ``n_bytes`` over all observed tokens.

        Entries that do not occur have 0 bytes.
        """
        return self.means() * (n_bytes / self._bytes_v.sum() if self._bytes_v.any() else 1.0)


@dataclass(frozen=True)
class RoundTrip:
    """The result of encoding and decoding a sample of documents.

    Attributes:
      documents: number of documents in the sample, of which only the beginnings are used.
      changed: number of documents that decoding does not restore exactly.
      lost: share of the bytes in the sample whose characters are dropped, replaced or unknown to the tokenizer.
    """

    documents: int
    changed: int
    lost: float


def describe_tokenizer(tokenizer: "Tokenizer", end_of_text: str | None, texts: Iterable[str]) -> dict[str, Any]:
    """Returns the entry of a tokenizer in a manifest; ``lossless`` and ``lost`` describe a sample of the texts.

    ``added_before`` is the token that the tokenizer itself puts before a text, if it is not the end of text.
    """
    vocabulary, end_of_text = vocabulary_size(tokenizer), find_end_of_text(tokenizer, end_of_text)
    found, added = round_trip(tokenizer, texts), _added_before(tokenizer)
    return {
        "vocabulary": vocabulary,
        "dtype": np.dtype(token_dtype(vocabulary)).name,
        "end_of_text": end_of_text,
        "end_of_text_id": tokenizer.token_to_id(end_of_text),
        "lossless": not found.changed,
        "lost": found.lost,
    } | ({} if added in (None, end_of_text) else {"added_before": added})


def round_trip(tokenizer: "Tokenizer", texts: Iterable[str]) -> RoundTrip:
    """Encodes and decodes the beginnings of the first texts, and compares them with the originals."""
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
    """Returns whether a pre-tokenizer passes exactly the bytes of a text to the model: splits, then byte-level."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    *splits, last = (step or {"type": None} for step in steps)
    cuts_only = all(
        step["type"] == "Digits" or (step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed")
        for step in splits
    )
    return cuts_only and last["type"] == "ByteLevel" and not last["add_prefix_space"]


def _added_before(tokenizer: "Tokenizer") -> str | None:
    """Returns the token that the tokenizer itself puts before a text, or None."""
    plain, whole = (tokenizer.encode("a", add_special_tokens=adds).tokens for adds in (False, True))
    return whole[0] if len(whole) > len(plain) and whole[:1] != plain[:1] else None


def _unknown(tokenizer: "Tokenizer") -> int | None:
    """Returns the id of the unknown token, or None."""
    model = json.loads(tokenizer.to_str())["model"]
    if model.get("unk_id") is not None:
        return model["unk_id"]
    return tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
