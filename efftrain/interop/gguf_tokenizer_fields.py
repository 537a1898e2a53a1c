"""The fields of a GGUF file that describe a byte-level BPE tokenizer: the way back from ``gguf_tokenizer``."""

import json
from typing import Any

from efftrain.errors import ConfigError
from efftrain.interop.gguf_pre_tokenizers import WORDS, name_of
from efftrain.interop.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, GgufTokenizer


def tokenizer_fields(source: GgufTokenizer, vocabulary: int | None = None) -> dict[str, Any]:
    """Returns the fields ``tokenizer.*`` for ``gguf_export.write_gguf``.

    Args:
      source: a byte-level BPE and its special tokens, whether they come from a GGUF file or not.
      vocabulary: number of rows of the embedding; ids without a token get an unused one. None: the largest id plus one.

    Raises:
      ConfigError: the tokenizer is no byte-level BPE, cuts words in a way that llama.cpp does not know, or has more
        tokens than ``vocabulary``.
    """
    content = json.loads(source.tokenizer.to_str())
    if content["model"]["type"] != "BPE" or (pre := name_of(content)) is None:
        raise ConfigError(
            "the tokenizer cannot be written to GGUF: it must be a byte-level BPE that cuts words as one of "
            f"{', '.join(WORDS)}; for a model from a GGUF file, pass the tokenizer fields of that file"
        )
    ids = source.tokenizer.get_vocab()
    size = max(ids.values()) + 1
    if vocabulary is not None and vocabulary < size:
        raise ConfigError(f"vocabulary is {vocabulary} and the tokenizer has {size} ids; use that of the model")
    size = vocabulary or size
    tokens, types = [f"[PAD{number}]" for number in range(size)], [UNUSED] * size
    for token, number in ids.items():
        tokens[number], types[number] = token, NORMAL
    for number, added in source.tokenizer.get_added_tokens_decoder().items():
        types[number] = CONTROL if added.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    fields: dict[str, Any] = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges}
    numbers = {"bos": source.bos, "unknown": source.unk, "padding": source.pad}
    numbers |= dict(zip(("eos", "eot", "eom"), source.eos, strict=False))
    fields |= {f"{name}_token_id": number for name, number in numbers.items() if number is not None}
    fields |= {"add_bos_token": source.add_bos, "add_eos_token": source.add_eos}
    found = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return found | ({} if source.chat_template is None else {"tokenizer.chat_template": source.chat_template})
