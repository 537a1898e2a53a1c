"""Trains a byte-level BPE tokenizer, or prepares any tokenizer of the ``tokenizers`` library for a corpus."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efftrain.data.storage.long_texts import without_long_runs
from efftrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # in tokenizers that are trained here, where its id is 0
SMALLEST_VOCABULARY = 257  # every byte, and the end of text

# The tokens that end a document in public tokenizers. If a tokenizer has several of them, the first in this order is
# used. Tokens that end a turn of a conversation, such as <|im_end|>, are not included.
KNOWN_ENDS_OF_TEXT = (
    END_OF_TEXT,  # GPT-2, GPT-NeoX, OLMo, Qwen, Falcon, Phi
    "<|end_of_text|>",  # Llama 3
    "</s>",  # SentencePiece: Llama 2, Mistral, T5, XLM-R, BLOOM
    "<eos>",  # Gemma
    "<｜end▁of▁sentence｜>",  # DeepSeek
    "<EOS_TOKEN>",  # Command R
    "[EOS]",
    "[SEP]",  # BERT
)
_MARK = "end_of_text"  # key in the entry of an added token in tokenizer.json; the library ignores unknown keys


def check_vocabulary(size: int) -> None:
    if size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"vocabulary is {size}; byte-level BPE needs at least {SMALLEST_VOCABULARY} (256 bytes and {END_OF_TEXT})"
        )


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> "Tokenizer":
    """Trains a byte-level BPE, which has an entry for every byte, so that no text is unknown.

    Args:
      texts: the sample; its words are counted immediately, and the texts are not kept. A word of more than a few
        kilobytes is divided, because the training time is quadratic in the length of a word.
      vocabulary: number of entries, including the 256 bytes and the end of text. A small sample may give fewer.
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
    tokenizer.train_from_iterator((piece for text in texts for piece in without_long_runs(text)), trainer)
    return _prepared(tokenizer, END_OF_TEXT)


def load_tokenizer(path: Path, end_of_text: str | None = None) -> "Tokenizer":
    """Loads a ``tokenizer.json`` to encode whole documents: without truncation, padding or dropout.

    Args:
      path: the file.
      end_of_text: the token between documents. None: the one that the file marks, or one of ``KNOWN_ENDS_OF_TEXT``.

    Raises:
      CorpusError: there is no such file, or it is not a tokenizer.
      ConfigError: the tokenizer has no end-of-text token.
    """
    tokenizer = read_tokenizer_file(path)
    try:
        return _prepared(tokenizer, find_end_of_text(tokenizer, end_of_text or marked_end_of_text(path)))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_tokenizer_file(path: Path) -> "Tokenizer":
    """Reads a ``tokenizer.json`` to encode whole texts: as ``load_tokenizer``, but it needs no end-of-text token.

    Raises:
      CorpusError: there is no such file, or it is not a tokenizer.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        raise CorpusError(f"there is no tokenizer {path}; build the corpus again")
    try:
        return _for_whole_texts(Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises nothing more specific
        raise CorpusError(f"{path} is not a tokenizer ({error}); build the corpus again") from error


def find_end_of_text(tokenizer: "Tokenizer", name: str | None = None) -> str:
    """Returns the token between documents: ``name``, or the first of ``KNOWN_ENDS_OF_TEXT``, special tokens first.

    Raises:
      ConfigError: there is no such token; the message lists the special tokens.
    """
    found = _known_end_of_text(tokenizer) if name is None else name
    if found is not None and tokenizer.token_to_id(found) is not None:
        return found
    problem = "no token is known to end a document" if name is None else f"it has no token {name!r}"
    raise ConfigError(
        f"{problem}; set corpus.end_of_text to the token that ends a document; the special tokens are: "
        f"{', '.join(map(repr, special_tokens(tokenizer))) or 'none'}"
    )


def marked_end_of_text(path: Path) -> str | None:
    """Returns the end-of-text token that a ``tokenizer.json`` marks, or None if it is the one that would be found."""
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens", ())
    return next((token["content"] for token in added if token.get(_MARK)), None)


def special_tokens(tokenizer: "Tokenizer") -> list[str]:
    """Returns the added tokens that are special, in the order of their ids."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return [token.content for _, token in added if token.special]


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Returns the largest id plus one; a tokenizer may have unused ids."""
    return max(tokenizer.get_vocab().values()) + 1


def first_difference(one: "Tokenizer", other: "Tokenizer") -> str | None:
    """Describes the first difference between two tokenizers for an error message; None if they are equal.

    They are equal whatever tokens they add to a text: a corpus has none of these.
    """
    mine, theirs = ({number: token for token, number in t.get_vocab().items()} for t in (one, other))
    for number in range(max(vocabulary_size(one), vocabulary_size(other))):
        if mine.get(number) != theirs.get(number):
            return f"entry {number} is {mine.get(number)!r} in one and {theirs.get(number)!r} in the other"
    contents = [json.loads(tokenizer.to_str()) | {"post_processor": None} for tokenizer in (one, other)]
    if contents[0] != contents[1]:
        return "their entries are the same, but their merges or normalisation differ"
    return None


def text_encoder(tokenizer: "Tokenizer") -> "Tokenizer":
    """Returns an equivalent tokenizer that never encodes text as a special token, even if the text spells one.

    ``encode_special_tokens`` prevents the library from finding special tokens in a text, but the model may have them
    among its own entries: Unigram, WordPiece and WordLevel then find ``</s>``. A split after the first character of
    each special token, as the last step of pre-tokenization, prevents this.
    """
    import re

    from tokenizers import Regex, Tokenizer, pre_tokenizers

    content = json.loads(tokenizer.to_str())
    model = content["model"]
    entries = model["vocab"] if isinstance(model["vocab"], dict) else {piece for piece, _ in model["vocab"]}
    spelled = [token for token in special_tokens(tokenizer) if len(token) > 1 and token in entries]
    if not spelled or (model["type"] == "BPE" and not model.get("ignore_merges")):  # no merge makes a special token
        return tokenizer
    pattern = "|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in spelled)
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    found = Tokenizer.from_str(json.dumps(content))
    found.pre_tokenizer = pre_tokenizers.Sequence([found.pre_tokenizer, cut]) if found.pre_tokenizer else cut
    found.encode_special_tokens = True
    return found


def token_dtype(vocabulary: int) -> type:
    """Returns the smallest unsigned integer type for the ids of a vocabulary: uint16 or uint32."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def tokenizer_json(tokenizer: "Tokenizer", end_of_text: str | None = None) -> str:
    """Returns the content of ``tokenizer.json``, indented and deterministic.

    Args:
      tokenizer: a tokenizer from ``load_tokenizer`` or ``train_tokenizer``.
      end_of_text: the token between documents, which is marked in the file if it is not the one that would be found.
        None: no token is marked.
    """
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    if end_of_text is not None and _known_end_of_text(tokenizer) != end_of_text:
        (token,) = (token for token in content["added_tokens"] if token["content"] == end_of_text)
        token[_MARK] = True
    return json.dumps(content, ensure_ascii=False, indent=1)


def _known_end_of_text(tokenizer: "Tokenizer") -> str | None:
    special, entries = special_tokens(tokenizer), tokenizer.get_vocab()
    return next((t for found in (special, entries) for t in KNOWN_ENDS_OF_TEXT if t in found), None)


def _prepared(tokenizer: "Tokenizer", end_of_text: str) -> "Tokenizer":
    if end_of_text not in special_tokens(tokenizer):
        tokenizer.add_special_tokens([end_of_text])  # an existing token keeps its id
    return _for_whole_texts(tokenizer)


def _for_whole_texts(tokenizer: "Tokenizer") -> "Tokenizer":
    # Text that spells a special token must not be encoded as it, which would divide a document and lose bytes.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer
