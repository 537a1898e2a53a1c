"""Reads conversations and encodes them for supervised fine-tuning (SFT), with the loss on the answers only."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.data.storage.token_bytes import ByteCounter
from efftrain.data.tasks.items import ALWAYS, Item
from efftrain.data.tasks.rows import examples_per_row, fill, pack
from efftrain.errors import ConfigError, EfftrainError
from efftrain.interop.chat_format import ASSISTANT, Message
from efftrain.interop.run_tokenizer import RunTokenizer
from efftrain.progress import console, track

_NOT_RENDERED = ("tools", "functions", "function_call")  # of OpenAI's format; leaving them out would change the text


@dataclass(frozen=True, kw_only=True)
class ConversationFields:
    """The fields of the objects of a file of JSON lines, as Hugging Face and OpenAI name them.

    Attributes:
      messages: the field with the list of messages, each with ``role`` and ``content``.
      question, answer: fields with the texts of a question and its answer, which are read instead of ``messages``.
        None: conversations are in ``messages``.
      system: text of the system message before each question. None: none, so that the template may write its own.
    """

    messages: str = "messages"
    question: str | None = None
    answer: str | None = None
    system: str | None = None

    def __post_init__(self):
        if (self.question is None) != (self.answer is None):
            raise ConfigError(
                f"fields.question is {self.question!r} and fields.answer is {self.answer!r}; give both, or neither for "
                "a file of messages"
            )
        if self.system is not None and self.question is None:
            raise ConfigError(
                "fields.system has no effect without fields.question; put system messages among the messages"
            )

    def conversation(self, row: Mapping[str, Any]) -> list[Message]:
        """Returns the messages of an object.

        Raises:
          ConfigError: a field is missing or has another form.
        """
        if self.question is not None and self.answer is not None:
            texts = {"system": self.system, "user": row.get(self.question), ASSISTANT: row.get(self.answer)}
            written = texts.items()
            messages: Any = [{"role": role, "content": text} for role, text in written if role != "system" or text]
        else:
            messages = row.get(self.messages)
            if not isinstance(messages, list) or not messages:
                raise ConfigError(
                    f"it has no list of messages in {self.messages!r}; its fields are {', '.join(map(repr, row))}"
                )
            if unread := [name for name in _NOT_RENDERED if row.get(name)]:
                raise ConfigError(f"it has {unread[0]!r}, which is not written into conversations; remove it")
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise ConfigError(f"message {number} has no role; give each message a role and a content")
            if not isinstance(message.get("content"), str):
                raise ConfigError(f"message {number}, of the role {message['role']}, has no text as its content")
            if message.get("weight", 1) != 1:
                raise ConfigError(
                    f"message {number} has the weight {message['weight']!r}, and every answer counts; leave the weight "
                    "out, or end the conversation before this message"
                )
        return messages


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation, and the file and line that it comes from."""

    origin: str
    messages: list[Message]


def read_conversations(path: Path, fields: ConversationFields = ConversationFields()) -> list[Conversation]:
    """Reads a file of JSON lines.

    Raises:
      ConfigError: there is no such file, it is empty, or a line is no conversation; the message names the line.
    """
    found = []
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); give a file of JSON lines in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        origin = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{origin} is not valid JSON ({error}); correct it") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{origin} is no JSON object; give one object per line")
        try:
            found.append(Conversation(origin, fields.conversation(row)))
        except ConfigError as error:
            raise ConfigError(f"{origin}: {error}") from error
    if not found:
        raise ConfigError(f"{path} has no conversations; give a file with one JSON object per line")
    return found


@dataclass(frozen=True)
class EncodedConversations:
    """Conversations as examples, whose targets are the tokens of the answers.

    Attributes:
      items: one for each conversation that is not too long, for ``TaskBatches`` and ``rows_once``.
      token_bytes: (vocabulary,) float64, mean bytes of text of each token where it is a target; special tokens have 0.
      too_long: number of conversations that were left out.
    """

    items: list[Item]
    token_bytes: np.ndarray
    too_long: int

    @property
    def n_targets(self) -> int:
        """Number of tokens on which the loss is taken in one pass."""
        return sum(int(item.counted[1:].sum()) for item in self.items)


def encode_conversations(
    tokenizer: RunTokenizer, conversations: Sequence[Conversation], *, length: int
) -> EncodedConversations:
    """Encodes conversations with the chat template of a run; the loss is on answers only, see ``encode_answers``.

    A conversation is never cut: one that does not fit into a row is left out, and a warning says how many were.

    Args:
      tokenizer: of the run whose model is fine-tuned.
      conversations: what is encoded.
      length: number of tokens of a row.

    Raises:
      ConfigError: a conversation has no answers, or the template does not fit it; the message names its line. Or no
        conversation fits into a row.
    """
    items, too_long, longest, counter = [], 0, 0, ByteCounter(tokenizer.vocabulary)
    for conversation in track(conversations, "Encoding conversations", len(conversations), unit="conversations"):
        try:
            found = tokenizer.encode_answers(conversation.messages)
        except EfftrainError as error:
            raise ConfigError(f"{conversation.origin}: {error}") from error
        item = Item(sequence=found.ids, words=np.full_like(found.ids, ALWAYS), counted=found.inside)
        if len(item) > length:
            too_long, longest = too_long + 1, max(longest, len(item))
            continue
        items.append(item)
        counter.add(found.ids[found.inside], found.n_bytes[found.inside])
    if too_long:
        problem = f"{too_long} of {len(conversations)} conversations have more than training.length {length} tokens"
        advice = f"the longest has {longest}; lengthen the rows to use them"
        if not items:
            raise ConfigError(f"all {problem}; {advice}")
        console.print(f"warning: {problem} and are left out; {advice}", style="yellow", markup=False)
    return EncodedConversations(items, counter.means(), too_long)


def rows_once(
    items: Sequence[Item], *, length: int, batch_size: int, part: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every item once, in order, several to a row; the last batch is filled up with empty rows.

    Args:
      items: the examples.
      length: number of tokens of a row.
      batch_size: rows of a batch, over all processes.
      part: (number of this process, number of processes), which selects its part of each batch.
    """
    per_row = examples_per_row(items, length)
    rows = pack(items, length, per_row)
    rows += [[]] * (-len(rows) % batch_size)
    local = batch_size // part[1]
    for start in range(part[0] * local, len(rows), batch_size):
        filled = [fill([items[i] for i in row], length, per_row, 0) for row in rows[start : start + local]]
        yield {name: np.stack([row[name] for row in filled]) for name in filled[0]}
