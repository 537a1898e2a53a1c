"""Encodes the examples of a task for a model: questions with labels, labels with questions, prompts with completions.

The ids of a task are those of the tokenizer, then one id that asks for the answer, then one id per label. A question is
``<|endoftext|> text <answer>``, and is followed by the id of its label.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from efftrain.config import digest
from efftrain.data.storage.tokenizer import (
    find_end_of_text,
    load_tokenizer,
    marked_end_of_text,
    text_encoder,
    tokenizer_json,
    vocabulary_size,
)
from efftrain.data.tasks.task import Example, answers
from efftrain.errors import RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ALWAYS = -1  # the word number of a token that word dropout never removes

Labels = Sequence[int] | np.ndarray  # the number of the label of each example


@dataclass(frozen=True)
class TaskIds:
    """The ids of everything that a model of a task reads and predicts: tokens, the answer token and labels.

    Attributes:
      tokenizer: the tokenizer of the text.
      labels: the labels in the order of their ids; empty if answers are texts.
      end_of_text: the token of the tokenizer before and after texts. None: the one that ``find_end_of_text`` finds.
    """

    tokenizer: "Tokenizer"
    labels: tuple[str, ...] = ()
    end_of_text: str | None = None

    @cached_property
    def end_of_text_id(self) -> int:
        found = self.tokenizer.token_to_id(find_end_of_text(self.tokenizer, self.end_of_text))
        assert found is not None  # ``find_end_of_text`` returns a token of the tokenizer
        return found

    @cached_property
    def _encoder(self) -> "Tokenizer":
        return text_encoder(self.tokenizer)

    @cached_property
    def answer(self) -> int:
        """The id of the token that asks for the answer."""
        return vocabulary_size(self.tokenizer)

    @property
    def first_label(self) -> int:
        return self.answer + 1

    @property
    def size(self) -> int:
        """The vocabulary size of the model."""
        return self.first_label + len(self.labels)

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each text its tokens, and the number of the word that each token belongs to, both (n,) int32."""
        found = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.word_ids, np.int32)) for e in found]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode([int(t) for t in tokens if t < self.answer])

    @property
    def fingerprint(self) -> str:
        """Digest of the tokenizer and the labels."""
        return digest({"tokenizer": tokenizer_json(self.tokenizer), "labels": self.labels})

    def write(self, folder: Path) -> None:
        """Writes ``tokenizer.json`` and ``labels.txt`` to a folder."""
        (folder / "tokenizer.json").write_text(tokenizer_json(self.tokenizer, self.end_of_text), encoding="utf-8")
        (folder / "labels.txt").write_text("".join(f"{label}\n" for label in self.labels), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "TaskIds":
        """Reads the files that ``write`` wrote to the folder of a run.

        Raises:
          RunError: the folder has no ``labels.txt``.
        """
        if not (folder / "labels.txt").exists():
            raise RunError(f"{folder} has no labels.txt; give the run directory of a task model")
        labels = (folder / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
        path = folder / "tokenizer.json"
        return TaskIds(load_tokenizer(path), tuple(labels), marked_end_of_text(path))


@dataclass(frozen=True, kw_only=True)
class Item:
    """One encoded example, which becomes a segment of a row.

    Attributes:
      sequence: (n,) int32 ids; all except the last are inputs, all except the first are targets.
      words: (n,) int32, the number of the word that an id belongs to, or ``ALWAYS``.
      counted: (n,) bool, True for ids that are targets of the loss on text.
      label: the number of the label that follows the last input token; -1 if it is unknown.
      asks: whether the last input token asks for a label.
      weight: weight of the loss on the text, summed over its tokens.
      teacher: (labels,) float32, the logits of a teacher for the label. None: no teacher.
    """

    sequence: np.ndarray
    words: np.ndarray
    counted: np.ndarray
    label: int = -1
    asks: bool = False
    weight: float = 1.0
    teacher: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of tokens that the item takes in a row."""
        return len(self.sequence) - 1


def questions(
    ids: TaskIds,
    texts: Sequence[str],
    labels: Labels | None = None,
    teacher: np.ndarray | None = None,
) -> list[Item]:
    """Encodes questions as ``<|endoftext|> text <answer>``, each followed by its label.

    Args:
      ids: the ids of the task.
      texts: the questions.
      labels: the number of the label of each question, -1 if it is unknown. None: all labels are unknown.
      teacher: (n, labels) logits of a teacher. None: no teacher.
    """
    found = []
    for i, (tokens, words) in enumerate(ids.encode(texts)):
        label = -1 if labels is None else int(labels[i])
        target = ids.first_label + label if label >= 0 else ids.end_of_text_id
        item = _item([ids.end_of_text_id], (tokens, words), [ids.answer, target], counted=(False, True, False))
        found.append(replace(item, label=label, asks=True, teacher=None if teacher is None else teacher[i]))
    return found


def conditionals(ids: TaskIds, texts: Sequence[str], labels: Labels, *, weight: float = 10.0) -> list[Item]:
    """Encodes examples as ``<|endoftext|> <label> text <|endoftext|>``, which teach a model to generate questions.

    Args:
      ids: the ids of the task.
      texts: the questions.
      labels: the number of the label of each question.
      weight: weight of the loss on each text, relative to 1 for the text of a question from ``questions``.
    """
    found = []
    for text, label in zip(ids.encode(texts), labels, strict=True):
        begins = [ids.end_of_text_id, ids.first_label + int(label)]
        found.append(replace(_item(begins, text, [ids.end_of_text_id], counted=(False, True, True)), weight=weight))
    return found


def completions(ids: TaskIds, examples: Sequence[Example]) -> list[Item]:
    """Encodes examples as ``<|endoftext|> prompt <answer> completion <|endoftext|>``.

    Only the completion is a target of the loss, and word dropout removes no word.
    """
    prompts = ids.encode([e.text for e in examples])
    completed = ids.encode(answers(examples))
    return [
        _item([ids.end_of_text_id, *prompt, ids.answer], (tokens, np.full_like(words, ALWAYS)), [ids.end_of_text_id],
              counted=(False, True, True))
        for (prompt, _), (tokens, words) in zip(prompts, completed, strict=True)
    ]  # fmt: skip


def _item(
    before: Sequence[int], text: tuple[np.ndarray, np.ndarray], after: Sequence[int], counted: tuple[bool, bool, bool]
) -> Item:
    tokens, words = text
    sizes = (len(before), len(tokens), len(after))
    return Item(
        sequence=np.concatenate([before, tokens, after]).astype(np.int32),
        words=np.concatenate([np.full(sizes[0], ALWAYS), words, np.full(sizes[2], ALWAYS)]).astype(np.int32),
        counted=np.repeat(counted, sizes),
    )


def leave_out(item: Item, rate: float, random: np.random.Generator) -> Item:
    """Applies word dropout: removes each word of an item with probability ``rate``, but keeps at least one word."""
    n = int(item.words.max(initial=ALWAYS)) + 1
    if not rate or n < 2:
        return item
    stays = random.random(n) >= rate
    stays[random.integers(n)] = True
    kept = np.append(stays, True)[item.words]  # the index ALWAYS selects the appended True
    return replace(item, sequence=item.sequence[kept], words=item.words[kept], counted=item.counted[kept])
