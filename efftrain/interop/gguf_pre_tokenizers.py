"""How the byte-level BPE tokenizers of GGUF files cut a text into words, by the name in ``tokenizer.ggml.pre``.

Source of names and expressions: llm_tokenizer_bpe in src/llama-vocab.cpp of llama.cpp. llama.cpp does not normalise;
where the tokenizer with which a model was trained does (NFC), so do these.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (  # %s is how often a digit may be repeated in a word
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
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
_LLAMA3 = Words((_CL100K % "{1,3}",), whole_words=True)

WORDS = {
    "default": Words((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": Words((_GPT2,)),
    "olmo": Words((_GPT2,), nfc=True),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": Words((_CL100K % "",), nfc=True),
}


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """Returns the name in ``WORDS`` of the words of a byte-level BPE, or None if llama.cpp would cut otherwise.

    Args:
      tokenizer: the content of its ``tokenizer.json``.
    """
    steps = tokenizer["pre_tokenizer"] or {}
    *splits, last = steps.get("pretokenizers", [steps]) or [{}]
    cuts = [_cut(step) for step in splits]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        cuts.append(_GPT2)
    normalizer = (tokenizer["normalizer"] or {}).get("type")
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    if normalizer not in (None, "NFC"):
        return None
    found = [name for name, words in WORDS.items() if (list(words.cuts), words.whole_words) == (cuts, whole_words)]
    return min(found, key=lambda name: WORDS[name].nfc != (normalizer == "NFC"), default=None)


def _cut(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    if step["type"] != "Split":
        return None
    return step["pattern"].get("Regex") if step["behavior"] == "Isolated" and not step["invert"] else None
