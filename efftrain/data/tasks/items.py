"""What a model of a task reads: questions before their labels, labels before questions, prompts before completions.

The ids of a task are the tokenizer's, behind them one that asks for the answer, behind it one for each label. A
question is ``<|endoftext|> text <answer>``, and the label's id is what follows.
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
from efftrain.data.tasks.task import Example
from efftrain.errors import RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ALWAYS = -1  # the word of a token that is never left out


@dataclass(frozen=True)
class TaskIds:
    """Numbers of everything that a model of a task reads and says.

    Attributes:
      tokenizer: of the text.
      labels: in the order of their ids; none where answers are texts.
      end_of_text: the tokenizer's token before and after texts. None: the one that ``find_end_of_text`` finds.
    """

    tokenizer: "Tokenizer"
    labels: tuple[str, ...] = ()
    end_of_text: str | None = None

    @cached_property
    def end_of_text_id(self) -> int:
        return self.tokenizer.token_to_id(find_end_of_text(self.tokenizer, self.end_of_text))

    @cached_property
    def _encoder(self) -> "Tokenizer":
        return text_encoder(self.tokenizer)

    @cached_property
    def answer(self) -> int:
        """What asks for the answer."""
        return vocabulary_size(self.tokenizer)

    @property
    def first_label(self) -> int:
        return self.answer + 1

    @property
    def size(self) -> int:
        """The model's vocabulary."""
        return self.first_label + len(self.labels)

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text its tokens, and the number of the word that each belongs to; (n,) int32 both."""
        found = self._encoder.encode_batch(list(texts), add_special_tokens=False)
        return [(np.array(e.ids, np.int32), np.array(e.word_ids, np.int32)) for e in found]

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode([int(t) for t in tokens if t < self.answer])

    @property
    def fingerprint(self) -> str:
        """Of the tokenizer and the labels."""
        return digest({"tokenizer": tokenizer_json(self.tokenizer), "labels": self.labels})

    def write(self, folder: Path) -> None:
        """``tokenizer.json`` and ``labels.txt``."""
        (folder / "tokenizer.json").write_text(tokenizer_json(self.tokenizer, self.end_of_text), encoding="utf-8")
        (folder / "labels.txt").write_text("".join(f"{label}\n" for label in self.labels), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> "TaskIds":
        """What ``write`` left in a run.

        Raises:
          RunError: it is not there.
        """
        if not (folder / "labels.txt").exists():
            raise RunError(f"{folder} holds no labels.txt; give the run of a model of a task")
        labels = (folder / "labels.txt").read_text(encoding="utf-8").split("\n")[:-1]
        path = folder / "tokenizer.json"
        return TaskIds(load_tokenizer(path), tuple(labels), marked_end_of_text(path))


@dataclass(frozen=True, kw_only=True)
class Item:
    """One segment of a row.

    Attributes:
      sequence: (n,) int32 ids; all but the last are read, all but the first are targets.
      words: (n,) int32, the word that an id belongs to, or ``ALWAYS``.
      counted: (n,) bool, whether an id is a target of the loss on text.
      label: the number of its label, which follows its last token. -1: not known.
      asks: its last token asks for a label.
      weight: of the loss on its text, over all of its tokens.
      teacher: (labels,) float32 logits of a teacher there. None: there is none.
    """

    sequence: np.ndarray
    words: np.ndarray
    counted: np.ndarray
    label: int = -1
    asks: bool = False
    weight: float = 1.0
    teacher: np.ndarray | None = None

    def __len__(self) -> int:
        """Tokens of a row that it takes."""
        return len(self.sequence) - 1


def questions(
    ids: TaskIds, texts: Sequence[str], labels: Sequence[int] | None = None, teacher: np.ndarray | None = None
) -> list[Item]:
    """``<|endoftext|> text <answer>``, then the label.

    Args:
      labels: numbers of labels, -1 where there is none. None: none has one.
      teacher: (n, labels) logits of a teacher.
    """
    found = []
    for i, (tokens, words) in enumerate(ids.encode(texts)):
        label = -1 if labels is None else int(labels[i])
        target = ids.first_label + label if label >= 0 else ids.end_of_text_id
        item = _item([ids.end_of_text_id], (tokens, words), [ids.answer, target], counted=(False, True, False))
        found.append(replace(item, label=label, asks=True, teacher=None if teacher is None else teacher[i]))
    return found


def conditionals(ids: TaskIds, texts: Sequence[str], labels: Sequence[int], *, weight: float = 10.0) -> list[Item]:
    """``<|endoftext|> <label> text <|endoftext|>``: what a model learns to make up questions from.

    Args:
      weight: beside the text of a question, which is there to be answered.
    """
    found = []
    for text, label in zip(ids.encode(texts), labels, strict=True):
        begins = [ids.end_of_text_id, ids.first_label + int(label)]
        found.append(replace(_item(begins, text, [ids.end_of_text_id], counted=(False, True, True)), weight=weight))
    return found


def completions(ids: TaskIds, examples: Sequence[Example]) -> list[Item]:
    """``<|endoftext|> prompt <answer> completion <|endoftext|>``; the completion counts alone, no word is left out."""
    prompts = ids.encode([e.text for e in examples])
    answers = ids.encode([e.answer for e in examples])
    return [
        _item([ids.end_of_text_id, *prompt, ids.answer], (tokens, np.full_like(words, ALWAYS)), [ids.end_of_text_id],
              counted=(False, True, True))
        for (prompt, _), (tokens, words) in zip(prompts, answers, strict=True)
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


def leave_out(item: Item, share: float, random: np.random.Generator) -> Item:
    """Without some words, each left out with a chance of ``share``; one of them stays at least."""
    n = int(item.words.max(initial=ALWAYS)) + 1
    if not share or n < 2:
        return item
    stays = random.random(n) >= share
    stays[random.integers(n)] = True
    kept = np.append(stays, True)[item.words]  # ALWAYS is the last one
    return replace(item, sequence=item.sequence[kept], words=item.words[kept], counted=item.counted[kept])
