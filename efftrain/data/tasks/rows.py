"""Packs the examples of a task into rows, several segments per row, so that short questions need little padding."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from efftrain.config import digest
from efftrain.data.tasks.items import Item, leave_out
from efftrain.errors import ConfigError, RunError

Row = dict[str, np.ndarray]


def examples_per_row(items: Sequence[Item], length: int) -> int:
    """Returns the number of slots for items in a row: 1.5 times the number of items that fit on average."""
    return max(1, int(1.5 * length / np.mean([len(item) for item in items])))


def pack(items: Sequence[Item], length: int, per_row: int) -> list[list[int]]:
    """Assigns items to rows, in order; a new row begins when the next item does not fit.

    Args:
      items: the items.
      length: number of tokens per row.
      per_row: largest number of items per row.

    Returns:
      The indices of the items in each row.

    Raises:
      ConfigError: an item is longer than a row.
    """
    rows: list[list[int]] = []
    room = 0
    for i, item in enumerate(items):
        if len(item) > length:
            raise ConfigError(
                f"an example has {len(item)} tokens, but a row has {length}; set training.length to {len(item)} or more"
            )
        if len(item) > room or len(rows[-1]) == per_row:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= len(item)
    return rows


def fill(items: Sequence[Item], length: int, per_row: int, n_labels: int) -> Row:
    """Returns the arrays of one row.

    Args:
      items: the items of the row.
      length: number of tokens per row.
      per_row: number of slots for items.
      n_labels: number of labels of the task. 0: answers are texts, and the row has only the arrays of ``packing.row``.

    Returns:
      A dict of arrays:
        tokens, targets, segments, positions: (length,) int32, see ``packing.row``.
        mask: (length,) bool, True for targets of the loss on text.
        weights: (length,) float32, which sum to ``Item.weight`` over the targets of each item.
        answers: (per_row,) int32, the index of the last token of each item, -1 if it does not ask for a label.
        labels: (per_row,) int32, the label of each item, -1 if there is none.
        teacher_logits: (per_row, n_labels) float32, only if some items have logits.
    """
    row: dict[str, np.ndarray] = {
        name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")
    }
    row["mask"] = np.zeros(length, bool)
    if n_labels:
        row["weights"] = np.zeros(length, np.float32)
        row |= {name: np.full(per_row, -1, np.int32) for name in ("answers", "labels")}
    taught = any(item.teacher is not None for item in items)
    if taught:
        row["teacher_logits"] = np.zeros((per_row, n_labels), np.float32)
    start = 0
    for i, item in enumerate(items):
        here = slice(start, start + len(item))
        row["tokens"][here], row["targets"][here] = item.sequence[:-1], item.sequence[1:]
        row["segments"][here], row["positions"][here] = i + 1, np.arange(len(item))
        row["mask"][here] = item.counted[1:]
        if n_labels:
            row["weights"][here] = item.weight * item.counted[1:] / max(item.counted[1:].sum(), 1)
        start += len(item)
        if item.asks:
            row["answers"][i], row["labels"][i] = start - 1, item.label
        if item.teacher is not None:
            row["teacher_logits"][i] = item.teacher
    return row


class TaskBatches:
    """An endless iterator over batches of a task. Each epoch has every item once, in a new order.

    The batches depend only on the arguments. Of each batch of B rows, process p of P gets rows [p*B/P, (p+1)*B/P).

    Args:
      items: the training items. Either all questions have the logits of a teacher, or none.
      length: number of tokens per row.
      batch_size: number of rows per batch, over all processes.
      seed: seed of the order and of word dropout.
      n_labels: number of labels of the task.
      word_dropout: probability with which each word is removed.
      part: (number of this process, number of processes), which selects its part of each batch.
      per_row: largest number of items per row; 1 for one item per row. None: ``examples_per_row``.
    """

    def __init__(
        self,
        items: Sequence[Item],
        *,
        length: int,
        batch_size: int,
        seed: int,
        n_labels: int,
        word_dropout: float = 0.0,
        part: tuple[int, int] = (0, 1),
        per_row: int | None = None,
    ):
        if not items:
            raise ConfigError("there is nothing to train on; give at least one example")
        if not 0 <= word_dropout < 1:
            raise ConfigError(f"word_dropout is {word_dropout}; give a share from 0 to below 1")
        if batch_size % part[1]:
            raise ConfigError(
                f"training.batch_size is {batch_size}, which is not divisible by the {part[1]} processes; use a "
                f"multiple of {part[1]}"
            )
        if len({item.teacher is None for item in items if item.asks}) > 1:
            raise ConfigError("some examples have a teacher's logits and others have none; label all of them")
        self._items, self._length, self._batch_size, self._seed = items, length, batch_size, seed
        self._n_labels, self._word_dropout, self._part = n_labels, word_dropout, part
        self._per_row = per_row or examples_per_row(items, length)
        pack(items, length, self._per_row)  # raises if an item does not fit when no word is removed
        self._taught = any(item.teacher is not None for item in items)
        settings = {"length": length, "batch": batch_size, "seed": seed, "words": word_dropout, "labels": n_labels}
        settings |= {} if per_row is None else {"per_row": per_row}
        self._identity = digest(settings | {"items": _fingerprint(items)})
        self._open(0, 0)

    def __iter__(self) -> "TaskBatches":
        return self

    def __next__(self) -> Row:
        local = self._batch_size // self._part[1]
        mine = range(self._part[0] * local, (self._part[0] + 1) * local)
        rows = []
        for number in range(self._batch_size):
            if self._row == len(self._rows):
                self._open(self._epoch + 1, 0)
            if number in mine:
                rows.append(self._filled(self._rows[self._row]))
            self._row += 1
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON values: epoch, row in the epoch, and the identity of the data."""
        return {"epoch": self._epoch, "row": self._row, "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes at a position from ``get_state``.

        Raises:
          RunError: the state belongs to other examples, or another seed, length or batch size.
        """
        if state.get("data") != self._identity:
            raise RunError(
                "the saved position of the data belongs to other examples, another seed, length or batch size; restore "
                "these, or start a new run"
            )
        self._open(state["epoch"], state["row"])

    def _open(self, epoch: int, row: int) -> None:
        random = np.random.default_rng([self._seed, epoch])
        order = random.permutation(len(self._items))
        self._now = [leave_out(self._items[i], self._word_dropout, random) for i in order]
        self._rows = pack(self._now, self._length, self._per_row)
        self._epoch, self._row = epoch, row

    def _filled(self, numbers: list[int]) -> Row:
        row = fill([self._now[i] for i in numbers], self._length, self._per_row, self._n_labels)
        if self._taught and "teacher_logits" not in row:
            row["teacher_logits"] = np.zeros((self._per_row, self._n_labels), np.float32)
        return row


def _fingerprint(items: Iterable[Item]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for item in items:
        for part in (item.sequence, item.words, item.counted, item.teacher):
            found.update(b"-" if part is None else np.ascontiguousarray(part).tobytes())
        found.update(f"{item.label} {item.asks} {item.weight}".encode())
    return found.hexdigest()
