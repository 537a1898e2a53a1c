"""Examples of a task from CSV or JSON lines: questions with labels, or prompts with completions.

Whatever is wrong with a file is said with its line, and nothing is left out without being counted.
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

WRITTEN_TYPE = "efftrain.data.task:Example"  # in fingerprints of tasks, wherever the class is by now

Record = tuple[int, dict[str, Any]]  # the line at which it begins, and its fields


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
      text: the question, or the prompt.
      answer: its label, or the completion. None: nobody said.
      line: where it began in its file.
    """

    text: str
    answer: str | None
    line: int


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Where a task's examples are: ``.csv`` with a header, or ``.jsonl``, in UTF-8.

    Blank lines at the end of a file mean nothing. Lines end in "\\n" or "\\r\\n"; in a text they end in "\\n".

    Attributes:
      labelled: what is trained on, and validated on.
      test: what is scored once, at the end.
      unlabelled: texts without answers. None: there are none.
      text: the column of questions or prompts.
      label: the column of labels or completions.
      generates: an answer is a text of its own and not one of some labels.
      validation: share of the labelled examples, of each label, that is not trained on.
      seed: of the choice of these.
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
    """Examples, checked and divided.

    Attributes:
      labels: sorted; none where answers are texts of their own.
      train, validation, test: examples with answers.
      unlabelled: examples without.
      removed: what was left out and how often.
    """

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    unlabelled: tuple[Example, ...]
    removed: dict[str, int]

    @property
    def fingerprint(self) -> str:
        """Of all examples and their parts."""
        parts = (self.train, self.validation, self.test, self.unlabelled)
        return json_digest([[asdict(example) | {"type": WRITTEN_TYPE} for example in part] for part in parts])

    def texts(self, part: Literal["train", "validation", "test", "unlabelled"]) -> list[str]:
        return [example.text for example in getattr(self, part)]

    def numbers(self, examples: Iterable[Example]) -> np.ndarray:
        """(n,) int32: which of the labels each example has, -1 where it has none."""
        number = {label: i for i, label in enumerate(self.labels)}
        return np.array([-1 if e.answer is None else number[e.answer] for e in examples], np.int32)


def open_task(files: TaskFiles) -> Task:
    """Reads a task's files.

    Texts of the test file are removed from the others, and of texts that come several times the first one stays; both
    are counted. Texts are the same where they differ in case and white space alone.

    Raises:
      CorpusError: a file is missing, not UTF-8, not CSV or JSON lines, lacks a column or a text; a label is unknown or
        has too few examples.
    """
    labelled = read_examples(files.labelled, files.text, files.label)
    test = read_examples(files.test, files.text, files.label)
    unlabelled = []
    if files.unlabelled is not None:
        unlabelled = read_examples(files.unlabelled, files.text, files.label, label_needed=False)
    labels = () if files.generates else tuple(sorted({e.answer for e in labelled}))
    if not files.generates:
        if len(labels) < 2:
            raise CorpusError(f"{files.labelled} has one label alone ({labels[0]!r}); a task needs at least 2")
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
    """Equal for texts that differ in case and white space alone."""
    return " ".join(text.casefold().split())


def read_examples(path: Path, text: str, label: str, *, label_needed: bool = True) -> list[Example]:
    """The examples of one file, in order.

    Args:
      text, label: the columns.
      label_needed: every example has an answer; else the column may be missing.

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
                raise CorpusError(f"{path}, line {line}: there is no column {column!r}; there are: {there}")
        given = {column: fields[column] for column in (text, label) if column in fields}
        for column, value in given.items():
            if not isinstance(value, str) or (not value.strip() and (label_needed or column == text)):
                what = "is empty" if isinstance(value, str) else f"is {value!r} and no text"
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
    return whole + _END_OF_LINE.match(content, len(whole))[0]  # spaces may belong to the last field


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
                "double those inside of a quoted field"
            ) from None
        if header is None:
            header = row
            if twice := [name for name, n in Counter(header).items() if n > 1]:
                raise CorpusError(f"{path}, line {begins}: column {twice[0]!r} is there twice; rename one")
        elif len(row) != len(header):
            raise CorpusError(
                f"{path}, line {begins}: {len(row)} fields where the header has {len(header)}; quote fields that hold "
                "commas"
            )
        else:
            yield begins, dict(zip(header, row, strict=True))


def _json_records(path: Path, content: str) -> Iterator[Record]:
    for number, line in enumerate(content.removesuffix("\n").split("\n") if content else [], start=1):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}, line {number} is not JSON ({error.msg}); mend or remove it") from None
        if not isinstance(fields, dict):
            raise CorpusError(f"{path}, line {number} is not a JSON object; write {{...}} with a field for each column")
        yield number, fields


def _check_labels(path: Path | None, examples: Sequence[Example], labels: tuple[str, ...]) -> None:
    for example in examples:
        if example.answer is not None and example.answer not in labels:
            raise CorpusError(
                f"{path}, line {example.line}: label {example.answer!r} has no labelled example; add some, or mend it"
            )


def _without(examples: Sequence[Example], known: set[str], removed: Counter, name: str) -> list[Example]:
    """Without known texts and repetitions."""
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
    """Training and validation, with the same share of each label."""
    groups: dict[str | None, list[int]] = {label: [] for label in labels or (None,)}
    for i, example in enumerate(examples):
        groups[example.answer if labels else None].append(i)
    random, held_out = np.random.default_rng(files.seed), set()
    for label, members in groups.items():
        if len(members) < 2:
            what = f"label {label!r} has" if labels else "there is"
            raise CorpusError(
                f"{files.labelled}: {what} {len(members)} example{'' if len(members) == 1 else 's'} that the test file "
                "does not hold; give at least 2, one to train and one to validate on"
            )
        n = min(max(1, round(files.validation * len(members))), len(members) - 1)
        held_out.update(random.permutation(members)[:n].tolist())
    parts: tuple[list[Example], list[Example]] = [], []
    for i, example in enumerate(examples):
        parts[i in held_out].append(example)
    return parts
