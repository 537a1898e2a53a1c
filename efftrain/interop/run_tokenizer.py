"""The tokenizer of a run as it is: which tokens it adds to a text, which end an answer, and its chat template."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efftrain.data.storage.tokenizer import (
    find_end_of_text,
    marked_end_of_text,
    read_tokenizer_file,
    special_tokens,
    text_encoder,
    vocabulary_size,
)
from efftrain.errors import ConfigError, RunError
from efftrain.interop.chat_format import ChatFormat, Message
from efftrain.interop.marked_text import Encoded, MarkedEncoder
from efftrain.train.run.directory import read_json
from efftrain.train.run.tokenizers import find_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class RunTokenizer:
    """A tokenizer, and what the files beside it say of it. No token is added that they do not name.

    Attributes:
      tokenizer: as its file describes it, without truncation and padding.
      bos: id of the token before a text or a conversation. None: there is none.
      eos: ids of the tokens after which a model has finished its answer, for ``generate(end_token=...)``.
      pad: id of the token that fills rows. None: there is none.
      chat: how conversations are written. None: the model has no chat template.
    """

    tokenizer: "Tokenizer"
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    chat: ChatFormat | None

    @property
    def vocabulary(self) -> int:
        """The largest id plus one."""
        return vocabulary_size(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Encodes a text, with the tokens that the tokenizer's own post-processor adds, such as ``bos``, and no others.

        A text that spells a special token is encoded as ordinary text: nobody can write one.
        """
        return self._text_encoder.encode(text).ids

    def encode_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Encodes a conversation as the chat template writes it. The markers of the template are single tokens.

        What a message says cannot become a special token: "<|im_end|>" in its content is encoded as ordinary text.
        Otherwise the tokens are those of ``apply_chat_template`` of transformers.

        Args:
          messages: the turns, each with ``role`` and ``content``.
          add_generation_prompt: end with the marker after which the model answers.

        Raises:
          ConfigError: there is no chat template, or it refuses the messages.
          ModelFileError: the template cannot be rendered.
        """
        text = self._format.text(messages, add_generation_prompt=add_generation_prompt)
        return self._marked_encoder.encode(text).ids.tolist()

    def encode_answers(self, messages: Sequence[Message]) -> Encoded:
        """Encodes a whole conversation as ``encode_chat``, and says which tokens are answers (``Encoded.inside``).

        These are the tokens on which fine-tuning takes its loss: what the assistant says, and the token that ends it.

        Raises:
          ConfigError, ModelFileError: see ``ChatFormat.answers``.
        """
        return self._marked_encoder.encode(self._format.answers(messages))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    @property
    def _format(self) -> ChatFormat:
        if self.chat is None:
            raise ConfigError(
                "the run has no chat template; put the one that its model is to learn into the run, as "
                "chat_template.jinja"
            )
        return self.chat

    @cached_property
    def _marked_encoder(self) -> MarkedEncoder:
        return MarkedEncoder(self.tokenizer)

    @cached_property
    def _text_encoder(self) -> "Tokenizer":
        return text_encoder(self.tokenizer)


def read_run_tokenizer(run: Path) -> RunTokenizer:
    """Reads the tokenizer of a run, with ``generation_config.json``, ``tokenizer_config.json`` and the chat template.

    ``eos`` are all ids of ``eos_token_id``; without it, the ``eos_token`` of ``tokenizer_config.json``. A run that was
    trained here has neither file; there the token between documents ends a text.

    Raises:
      RunError: the run has no tokenizer, or a file names a token that the tokenizer does not have.
    """
    path = find_tokenizer(run)
    if path is None:
        raise RunError(f"{run} has no tokenizer.json; copy that of the corpus it was trained on into the run")
    files = _Files(run, read_tokenizer_file(path))
    eos = files.ids("eos")
    if not files:
        found = files.tokenizer.token_to_id(find_end_of_text(files.tokenizer, marked_end_of_text(path)))
        assert found is not None  # ``find_end_of_text`` returns a token of the tokenizer
        eos = (found,)
    bos, pad = (next(iter(files.ids(name)), None) for name in ("bos", "pad"))
    template = run / "chat_template.jinja"
    chat = None
    if template.is_file():
        names = {"bos": files.text("bos", bos), "eos": files.text("eos", next(iter(eos), None))}
        chat = ChatFormat(
            template.read_text("utf-8"),
            **names,
            special=tuple(special_tokens(files.tokenizer)),
            ends=tuple(str(files.tokenizer.id_to_token(number)) for number in eos),
        )
    return RunTokenizer(files.tokenizer, bos, eos, pad, chat)


class _Files:
    """What two files of a run say of its tokens."""

    def __init__(self, run: Path, tokenizer: "Tokenizer"):
        self._generation_path, self._config_path = run / "generation_config.json", run / "tokenizer_config.json"
        self._generation, self._config = _read(self._generation_path), _read(self._config_path)
        self.tokenizer = tokenizer

    def __bool__(self) -> bool:
        return bool(self._generation or self._config)

    def text(self, name: str, number: int | None) -> str | None:
        """The text of a token as templates know it: as the tokenizer's file names it, else that of the id."""
        token = self._config.get(f"{name}_token")
        found = token.get("content") if isinstance(token, dict) else token
        return found if found is not None or number is None else self.tokenizer.id_to_token(number)

    def ids(self, name: str) -> tuple[int, ...]:
        found = self._generation.get(f"{name}_token_id")
        numbers = tuple(found) if isinstance(found, list) else () if found is None else (found,)
        for number in numbers:
            if not isinstance(number, int) or self.tokenizer.id_to_token(number) is None:
                raise RunError(
                    f"{self._generation_path}: {name}_token_id is {number!r}, which is no token of the run; correct it"
                )
        if numbers or (text := self.text(name, None)) is None:
            return numbers
        if (number := self.tokenizer.token_to_id(text)) is None:
            raise RunError(f"{self._config_path}: {name}_token is {text!r}, which is no token of the run; correct it")
        return (number,)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
