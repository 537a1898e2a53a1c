"""Builds the tokenizer of a GGUF file: byte-level BPE, or SentencePiece as in Llama 2, Mistral and Gemma."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efftrain.errors import ModelFileError
from efftrain.interop.gguf_pre_tokenizers import WORDS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types of llama.cpp
_SPACE = "▁"  # in the entries of SentencePiece
_BOS_UNLESS_SAID = ("llama-bpe", "llama3", "llama-v3")  # byte-level ones for which llama.cpp assumes it
_ENDS = ("eos", "eot", "eom")  # end of sequence, of a turn, of a message to a tool


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer with the special tokens that a model expects.

    Attributes:
      tokenizer: encodes text without adding special tokens; markers such as ``<|im_start|>`` in a text become one id.
      bos: id of the token before a text, if the model has one.
      eos: ids of the tokens that end an answer, without repetitions, the one of ``eos_token_id`` first.
      pad: id of the token that fills a batch.
      unk: id of the token for what has no entry.
      add_bos: the model was trained with ``bos`` before every text.
      add_eos: the model was trained with ``eos`` after every text.
      chat_template: the Jinja template of a conversation, if the file has one; see ``chat_template.render``.
    """

    tokenizer: "Tokenizer"
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    unk: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None

    def with_added_tokens(self) -> "Tokenizer":
        """Returns the tokenizer with a post-processor that adds ``bos`` and ``eos``, if the file says that they are.

        There other programs find what a ``tokenizer.json`` adds to a text.
        """
        from tokenizers import Tokenizer, processors

        before = [self.bos] if self.add_bos and self.bos is not None else []
        after = [self.eos[0]] if self.add_eos and self.eos else []
        if not before + after:
            return self.tokenizer
        names = {number: str(self.tokenizer.id_to_token(number)) for number in (*before, *after)}
        single = [*(names[number] for number in before), "$A", *(names[number] for number in after)]
        found = Tokenizer.from_str(self.tokenizer.to_str())
        added = [(name, number) for number, name in names.items()]
        found.post_processor = processors.TemplateProcessing(single=single, special_tokens=added)
        return found


def read_tokenizer(path: Path, metadata: Mapping[str, Any]) -> GgufTokenizer:
    """Builds the tokenizer that the metadata of a GGUF file describe.

    Args:
      path: the file, for messages.
      metadata: ``GgufFile.metadata``.

    Raises:
      ModelFileError: the file has no tokenizer, one of an unknown kind, or a damaged one.
    """
    fields = _Fields(path, metadata)
    kind = fields.get("model", str, None)
    if kind not in ("gpt2", "llama"):
        raise fields.unsupported("model", kind, "gpt2 (byte-level BPE) and llama (SentencePiece)")
    tokens = fields.entries("tokens", str)
    types = fields.entries("token_type", int, len(tokens)) if fields.has("token_type") else [NORMAL] * len(tokens)
    ids = {token: number for number, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if ids[token] != number)
        raise fields.damaged("tokens", f"has the entry {twice!r} twice")
    unk = fields.token_id("unknown", len(tokens))
    bos = fields.token_id("bos", len(tokens))
    ends = [number for name in _ENDS if (number := fields.token_id(name, len(tokens))) is not None]
    try:
        tokenizer = _byte_level(fields, ids) if kind == "gpt2" else _sentence_piece(fields, ids, types, unk)
    except ModelFileError:
        raise
    except Exception as error:  # the library raises nothing more specific
        raise fields.damaged("tokens", f"makes no tokenizer ({error})") from error
    _add_markers(tokenizer, tokens, types, {bos, *ends})
    return GgufTokenizer(
        tokenizer=tokenizer,
        bos=bos,
        eos=tuple(dict.fromkeys(ends)),
        pad=fields.token_id("padding", len(tokens)),
        unk=unk,
        add_bos=fields.get("add_bos_token", bool, kind == "llama" or fields.get("pre", str, "") in _BOS_UNLESS_SAID),
        add_eos=fields.get("add_eos_token", bool, False),
        chat_template=fields.template(),
    )


class _Fields:
    """The fields ``tokenizer.ggml.*`` of a file, checked."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]):
        self.path, self.metadata = path, metadata

    def damaged(self, name: str, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: tokenizer.ggml.{name} {problem}; download or convert the model again")

    def unsupported(self, name: str, found: Any, known: str) -> ModelFileError:
        state = "is missing" if found is None else f"is {found!r}"
        return ModelFileError(
            f"{self.path}: tokenizer.ggml.{name} {state}, and only {known} can be read; use the tokenizer.json of the "
            "original model"
        )

    def has(self, name: str) -> bool:
        return f"tokenizer.ggml.{name}" in self.metadata

    def get(self, name: str, kind: type, default: Any) -> Any:
        found = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if found is not default and type(found) is not kind:
            raise self.damaged(name, f"is {found!r} and must be of the type {kind.__name__}")
        return found

    def entries(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        found = self.get(name, list, None)
        if not found or any(type(entry) is not kind for entry in found):
            raise self.damaged(name, f"must be a list of the type {kind.__name__}")
        if length is not None and len(found) != length:
            raise self.damaged(name, f"has {len(found)} entries for {length} tokens")
        return found

    def token_id(self, name: str, size: int) -> int | None:
        found = self.get(f"{name}_token_id", int, None)
        if found is not None and not 0 <= found < size:
            raise self.damaged(f"{name}_token_id", f"is {found} and there are {size} tokens")
        return found

    def template(self) -> str | None:
        found = self.metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) and found else None


def _byte_level(fields: _Fields, ids: Mapping[str, int]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    words = WORDS.get(pre) if (pre := fields.get("pre", str, None)) is not None else None
    if words is None:
        raise fields.unsupported("pre", pre, ", ".join(WORDS))
    merges = []
    for merge in fields.entries("merges", str):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or not {left, right, left + right} <= ids.keys():
            raise fields.damaged("merges", f"has the entry {merge!r}, which does not join two tokens into one")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=dict(ids), merges=merges, ignore_merges=words.whole_words))
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = words.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(fields: _Fields, ids: Mapping[str, int], types: Sequence[int], unk: int | None) -> "Tokenizer":
    """BPE that merges the pair with the best score, as BPE with merges in the order of scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens = list(ids)
    unk = next((number for number, kind in enumerate(types) if kind == UNKNOWN), None) if unk is None else unk
    model = models.BPE(
        vocab=dict(ids),
        merges=_merges_of_scores(tokens, types, fields.entries("scores", float, len(tokens))),
        unk_token=None if unk is None else tokens[unk],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("add_space_prefix", bool, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        decode.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merges_of_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Returns every way to join two entries into a third; joins into entries of higher scores come first.

    Markers and bytes take no part: SentencePiece does not find them in a text.
    """
    number = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    ranked = []
    for token, i in number.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in number and right in number:
                ranked.append((-scores[i], i, cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _add_markers(tokenizer: "Tokenizer", tokens: Sequence[str], types: Sequence[int], special: set[int | None]) -> None:
    """Makes control tokens, and those that begin and end texts, special, and user-defined ones added tokens."""
    from tokenizers import AddedToken

    special = special | {i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL)}
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for i, t in enumerate(tokens) if i in special])
    added = [t for i, t in enumerate(tokens) if types[i] == USER_DEFINED and i not in special]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
