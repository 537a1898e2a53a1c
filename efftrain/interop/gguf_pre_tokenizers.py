"""How the byte-level BPE tokenizers of GGUF files cut a text into words, by the name in ``tokenizer.ggml.pre``.

Source of names and expressions: llm_tokenizer_bpe in src/llama-vocab.cpp of llama.cpp. llama.cpp does not normalise;
where the tokenizer with which a model was trained does (NFC), so do these.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (  # %s is how many digits are one word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Words:
    """How a text is cut before merges.

    Attributes:
      cuts: expressions; each cuts the pieces of the one before into its matches and what lies between them.
      nfc: the text is brought into Unicode's normal form C first.
      whole_words: a word that is an entry is that entry, even if no merges lead to it (``ignore_merges``).
    """

    cuts: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False

    def pre_tokenizer(self) -> "PreTokenizer":
        from tokenizers import Regex, pre_tokenizers

        return pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in self.cuts),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


_SINGLE_DIGITS = Words((r"\p{N}", _GPT2))
_LLAMA3 = Words((_CL100K % "1,3",), whole_words=True)

WORDS = {
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Words((_GPT2,)),
    "olmo": Words((_GPT2,), nfc=True),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Words((_CL100K % "1",), nfc=True),
}
