"""Rows of a task: each example a segment, several in a row, so that short questions waste no padding."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from efftrain.config import digest
from efftrain.data.tasks.items import Item, leave_out
from efftrain.errors import ConfigError, RunError

Row = dict[str, np.ndarray]


def examples_per_row(items: Sequence[Item], length: int) -> int:
    """Room for answers in a row: half as much again as fit on average."""
    return max(1, int(1.5 * length / np.mean([len(item) for item in items])))


def pack(items: Sequence[Item], length: int, per_row: int) -> list[list[int]]:
    """Which items stand in each row, in order: a row ends where the next one has no room.

    Raises:
      ConfigError: an item is longer than a row.
    """
    rows: list[list[int]] = []
    room = 0
    for i, item in enumerate(items):
        if len(item) > length:
            raise ConfigError(
                f"an example has {len(item)} tokens and a row {length}; set training.length to {len(item)} or more"
            )
        if len(item) > room or len(rows[-1]) == per_row:
            rows.append([])
            room = length
        rows[-1].append(i)
        room -= len(item)
    return rows


def fill(items: Sequence[Item], length: int, per_row: int, n_labels: int) -> Row:
    """The arrays of one row.

    Returns:
      tokens, targets, segments, positions (length,) int32 and mask (length,) bool as in ``packing.row``, where mask is
      True for targets of the loss on text; weights (length,) float32: those of an item are its own together;
      answers (per_row,) int32: the place of each item's last token, -1 where none asks; labels (per_row,) int32, -1
      where there is none; teacher_logits (per_row, n_labels) float32, where the items have any.
    """
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segments", "positions")}
    row |= {"mask": np.zeros(length, bool), "weights": np.zeros(length, np.float32)}
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
        row["weights"][here] = item.weight * item.counted[1:] / max(item.counted[1:].sum(), 1)
        start += len(item)
        if item.asks:
            row["answers"][i], row["labels"][i] = start - 1, item.label
        if item.teacher is not None:
            row["teacher_logits"][i] = item.teacher
    return row


class TaskBatches:
    """Endless batches of a task: in each epoch every item once, in another order.

    The batches depend on the arguments alone; process p of P takes the rows [p*B/P, (p+1)*B/P) of each.

    Args:
      items: what is trained on; all with a teacher's logits, or none.
      length: tokens of a row.
      batch_size: rows of a batch, over all processes.
      seed: of the order, and of the words that are left out.
      n_labels: of the task.
      word_dropout: chance of a word to be left out.
      part: which part of each batch this process gets: (number, of how many).
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
    ):
        if not items:
            raise ConfigError("there is nothing to train on; give at least one example")
        if not 0 <= word_dropout < 1:
            raise ConfigError(f"word_dropout is {word_dropout}; give a share from 0 to below 1")
        if batch_size % part[1]:
            raise ConfigError(
                f"training.batch_size {batch_size} does not divide among {part[1]} processes; use a multiple"
            )
        if len({item.teacher is None for item in items if item.asks}) > 1:
            raise ConfigError("some examples have a teacher's logits and others none; let it label all of them")
        self._items, self._length, self._batch_size, self._seed = items, length, batch_size, seed
        self._n_labels, self._word_dropout, self._part = n_labels, word_dropout, part
        self._per_row = examples_per_row(items, length)
        pack(items, length, self._per_row)  # all of them have room, also where no word is left out
        self._taught = any(item.teacher is not None for item in items)
        settings = {"length": length, "batch": batch_size, "seed": seed, "words": word_dropout, "labels": n_labels}
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
        return {"epoch": self._epoch, "row": self._row, "data": self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where ``get_state`` was called.

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
