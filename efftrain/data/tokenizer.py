"""Byte-level BPE: trained on a sample, lossless on any text, and its lengths in bytes for bits per byte."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from efftrain.data.batching import by_size
from efftrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0  # it stands before every document, so that the first token of a text has something to follow
SMALLEST_VOCABULARY = 257  # every byte, and the end of text
_BATCH_CHARS = 1 << 20


def check_vocabulary(size: int) -> None:
    if size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary is {size}; byte-level BPE needs at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT})"
        )


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """Trains a tokenizer that has an entry for every byte, so that nothing is unknown.

    Args:
      texts: the sample; it is counted into words at once and not kept.
      vocabulary: entries including the 256 bytes and the end of text. A small sample may give fewer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocabulary(vocabulary)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _prepared(tokenizer)


def load_tokenizer(path: Path) -> "Tokenizer":
    """Loads ``tokenizer.json``.

    Raises:
      CorpusError: there is none, or it is not a tokenizer with ``<|endoftext|>`` at id 0.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CorpusError(f"there is no tokenizer {path}; build the corpus again")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise CorpusError(f"{path} is not a tokenizer ({error}); build the corpus again") from error
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise CorpusError(f"{path} does not have {END_OF_TEXT} at id {END_OF_TEXT_ID}; build the corpus again")
    return _prepared(tokenizer)


def token_bytes(tokenizer: "Tokenizer") -> np.ndarray:
    """(vocabulary,) int32: how many bytes of text each token stands for; 0 for the end of text."""
    lengths = np.zeros(tokenizer.get_vocab_size(), np.int32)
    for token, number in tokenizer.get_vocab().items():
        lengths[number] = len(token)  # byte-level BPE writes each byte as one character
    lengths[END_OF_TEXT_ID] = 0
    return lengths


def first_difference(one: "Tokenizer", other: "Tokenizer") -> str | None:
    """What the first entry is in which two tokenizers differ, for an error message; None where they are the same."""
    mine, theirs = ({number: token for token, number in t.get_vocab().items()} for t in (one, other))
    for number in range(max(len(mine), len(theirs))):
        if mine.get(number) != theirs.get(number):
            return f"entry {number} is {mine.get(number)!r} in the one and {theirs.get(number)!r} in the other"
    if tokenizer_json(one) != tokenizer_json(other):
        return "their entries are the same, and their merges or normalisation are not"
    return None


def encode_documents(tokenizer: "Tokenizer", texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Yields for each text the int32 ids of ``<|endoftext|>`` and its tokens. Batches run on all cores."""
    for batch in by_size(texts, _BATCH_CHARS):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            yield np.array([END_OF_TEXT_ID, *encoding.ids], np.int32)


def token_dtype(vocabulary: int) -> type:
    """The smallest unsigned type that holds every id."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def tokenizer_json(tokenizer: "Tokenizer") -> str:
    """The file's content, readable and the same for the same tokenizer."""
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1)


def _prepared(tokenizer: "Tokenizer") -> "Tokenizer":
    # A text that spells the end of text must not become it: it would cut the document and lose its bytes.
    tokenizer.encode_special_tokens = True
    return tokenizer
