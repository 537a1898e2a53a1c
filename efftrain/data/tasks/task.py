"""Reads the examples of a task from CSV or JSON Lines: questions with labels, or prompts with completions.

Errors in a file are reported with their line, and every example that is dropped is counted.
"""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from efftrain.config import json_digest
from efftrain.data.documents import clean_lines
from efftrain.errors import ConfigError, CorpusError

_END_OF_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)?")

WRITTEN_TYPE = "efftrain.data.task:Example"  # part of fingerprints of tasks, so that it stays if the class is moved

Record = tuple[int, dict[str, Any]]  # the line at which the record begins, and its fields


@dataclass(frozen=True)
class Example:
    """One example of a task.

    Attributes:
      text: the question, or the prompt.
      answer: the label, or the completion. None: unknown.
      line: the line of the file at which the example begins.
    """

    text: str
    answer: str | None
    line: int


def answers(examples: Iterable[Example]) -> list[str]:
    """Returns the answer of each example.

    Raises:
      CorpusError: an example has none.
    """
    found = [example.answer for example in examples]
    known = [answer for answer in found if answer is not None]
    if len(known) < len(found):
        raise CorpusError(f"{len(found) - len(known)} of {len(found)} examples have no answer; give labelled examples")
    return known


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """The files with the examples of a task: ``.csv`` with a header, or ``.jsonl``, in UTF-8.

    Blank lines at the end of a file are ignored. Lines may end in "\\n" or "\\r\\n"; in the examples they end in "\\n".

    Attributes:
      labelled: the examples for training and validation.
      test: the examples that are scored once, at the end.
      unlabelled: texts without answers. None: there are none.
      text: the column of questions or prompts.
      label: the column of labels or completions.
      generates: whether answers are free texts rather than labels from a fixed set.
      validation: share of the labelled examples of each label that is used for validation, between 0 and 1.
      seed: seed of the choice of the validation examples.
    """

    labelled: Path
    test: Path
    unlabelled: Path | None = None
    text: str = "text"
    label: str = "label"
    generates: bool = False
    validation: float = 0.1
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.validation < 1:
            raise ConfigError(f"files.validation is {self.validation}; give a share between 0 and 1")


@dataclass(frozen=True)
class Task:
    """The examples of a task, checked and divided into splits.

    Attributes:
      labels: the labels in sorted order; empty if answers are free texts.
      train, validation, test: examples with answers.
      unlabelled: examples without answers.
      removed: the number of examples that were dropped, by reason.
    """

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    unlabelled: tuple[Example, ...]
    removed: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Digest of all examples and of their division into splits."""
        parts = (self.train, self.validation, self.test, self.unlabelled)
        return json_digest([[asdict(example) | {"type": WRITTEN_TYPE} for example in part] for part in parts])

    def texts(self, part: Literal["train", "validation", "test", "unlabelled"]) -> list[str]:
        """Returns the questions or prompts of a split."""
        return [example.text for example in getattr(self, part)]

    def numbers(self, examples: Iterable[Example]) -> np.ndarray:
        """Returns the index of the label of each example, (n,) int32, or -1 if it has none."""
        number = {label: i for i, label in enumerate(self.labels)}
        return np.array([-1 if e.answer is None else number[e.answer] for e in examples], np.int32)


def open_task(files: TaskFiles) -> Task:
    """Reads and checks the files of a task, and divides the labelled examples into training and validation.

    Texts of the test file are removed from the other files, and of repeated texts the first is kept; both are counted
    in ``Task.removed``. Texts are equal if they differ only in case and white space.

    Raises:
      CorpusError: a file is missing, not UTF-8, not CSV or JSON Lines, or lacks a column or a text; a label is unknown
        or has too few examples.
    """
    labelled = read_examples(files.labelled, files.text, files.label)
    test = read_examples(files.test, files.text, files.label)
    unlabelled = []
    if files.unlabelled is not None:
        unlabelled = read_examples(files.unlabelled, files.text, files.label, label_needed=False)
    labels = () if files.generates else tuple(sorted(set(answers(labelled))))
    if not files.generates:
        if len(labels) < 2:
            raise CorpusError(f"{files.labelled} has only one label ({labels[0]!r}); a task needs at least 2")
        _check_labels(files.test, test, labels)
        _check_labels(files.unlabelled, unlabelled, labels)
    tested, removed = {same_text(e.text) for e in test}, Counter()
    labelled = _without(labelled, tested, removed, "labelled")
    unlabelled = _without(unlabelled, tested | {same_text(e.text) for e in labelled}, removed, "unlabelled")
    train, validation = _split(files, labelled, labels)
    return Task(
        labels=labels,
        train=tuple(train),
        validation=tuple(validation),
        test=tuple(test),
        unlabelled=tuple(replace(e, answer=None) for e in unlabelled),
        removed=dict(removed),
    )


def same_text(text: str) -> str:
    """Returns a normalised text, which is equal for texts that differ only in case and white space."""
    return " ".join(text.casefold().split())


def read_examples(path: Path, text: str, label: str, *, label_needed: bool = True) -> list[Example]:
    """Reads the examples of one file, in order.

    Args:
      path: the file.
      text, label: the names of the columns.
      label_needed: whether every example must have an answer. If False, the column may be missing or empty.

    Raises:
      CorpusError: see ``open_task``.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl"):
        raise CorpusError(f"{path} is neither .csv nor .jsonl; give a file of one of these kinds")
    content = _decoded(path)
    found = []
    for line, fields in (_csv_records if kind == ".csv" else _json_records)(path, content):
        for column in (text, label) if label_needed else (text,):
            if column not in fields:
                there = ", ".join(map(str, fields)) or "none"
                raise CorpusError(f"{path}, line {line}: there is no column {column!r}; the columns are: {there}")
        given = {column: fields[column] for column in (text, label) if column in fields}
        for column, value in given.items():
            if not isinstance(value, str) or (not value.strip() and (label_needed or column == text)):
                what = "is empty" if isinstance(value, str) else f"is {value!r}, not text"
                raise CorpusError(f"{path}, line {line}: {column!r} {what}; fill it in or remove the line")
        given = {column: clean_lines(value) for column, value in given.items()}
        found.append(Example(given[text], given.get(label) or None, line))
    if not found:
        raise CorpusError(f"{path} has no examples; give a file with at least one")
    return found


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"cannot read {path} ({error.strerror}); give the path of a file") from error
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CorpusError(f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; save it as UTF-8") from None
    whole = content.rstrip()
    end = _END_OF_LINE.match(content, len(whole))
    return whole + (end[0] if end else "")  # keeps spaces, which may belong to the last field


def _csv_records(path: Path, content: str) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(content, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        begins = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise CorpusError(
                f"{path}: the record that begins in line {begins} is not CSV ({error}); close its quotation marks, and "
                "double those inside a quoted field"
            ) from None
        if header is None:
            header = row
            if twice := [name for name, n in Counter(header).items() if n > 1]:
                raise CorpusError(f"{path}, line {begins}: column {twice[0]!r} appears twice; rename one")
        elif len(row) != len(header):
            raise CorpusError(
                f"{path}, line {begins}: the record has {len(row)} fields, but the header has {len(header)}; quote "
                "fields that contain commas"
            )
        else:
            yield begins, dict(zip(header, row, strict=True))


def _json_records(path: Path, content: str) -> Iterator[Record]:
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number} is not JSON ({error.msg}); fix or remove it") from None
        if not isinstance(fields, dict):
            raise CorpusError(f"{path}, line {number} is not a JSON object; write {{...}} with a field for each column")
        yield number, fields


def _check_labels(path: Path | None, examples: Sequence[Example], labels: tuple[str, ...]) -> None:
    for example in examples:
        if example.answer is not None and example.answer not in labels:
            raise CorpusError(
                f"{path}, line {example.line}: label {example.answer!r} has no labelled example; add some, or correct "
                "it"
            )


def _without(examples: Sequence[Example], known: set[str], removed: Counter, name: str) -> list[Example]:
    """Returns the examples without known and repeated texts, and counts those that are dropped in ``removed``."""
    kept: dict[str, Example] = {}
    for example in examples:
        text = same_text(example.text)
        if text in known:
            removed[f"{name}, known"] += 1
        elif text in kept:
            removed[f"{name}, repeated"] += 1
        else:
            kept[text] = example
    return list(kept.values())


def _split(files: TaskFiles, examples: list[Example], labels: tuple[str, ...]) -> tuple[list[Example], list[Example]]:
    """Divides examples into training and validation, with the same share of each label."""
    groups: dict[str | None, list[int]] = {label: [] for label in labels or (None,)}
    for i, example in enumerate(examples):
        groups[example.answer if labels else None].append(i)
    random, held_out = np.random.default_rng(files.seed), set()
    for label, members in groups.items():
        if len(members) < 2:
            what = f"label {label!r} has" if labels else "there is"
            raise CorpusError(
                f"{files.labelled}: {what} {len(members)} example{'' if len(members) == 1 else 's'} that the test file "
                "does not hold; give at least 2, one for training and one for validation"
            )
        n = min(max(1, round(files.validation * len(members))), len(members) - 1)
        held_out.update(random.permutation(members)[:n].tolist())
    parts: tuple[list[Example], list[Example]] = [], []
    for i, example in enumerate(examples):
        parts[i in held_out].append(example)
    return parts
