"""The data that a task's teacher makes for a student: logits over labels, answers, and synthetic questions."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.code_identity import code_identity
from efftrain.compress.task.task import predict
from efftrain.compress.task.task_run import longest_answer, task_loss
from efftrain.compress.task.task_texts import Augmentation, agreed_answers, answer, synthesise
from efftrain.config import to_json
from efftrain.data.tasks.items import Item, TaskIds, completions, questions
from efftrain.data.tasks.task import Example, Task, answers
from efftrain.measure.measurements import other_origin
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.train.inputs import model_digest

ROOMS = ("compress", "data", "models", "ops")  # packages whose code decides what a teacher says
# Quantile of the lengths of the task's texts that limits synthetic texts, because a batch waits for its longest text.
LONGEST_TEXT = 0.98


@dataclass(frozen=True)
class TeacherLabels:
    """What a teacher made for a student.

    Attributes:
      texts: the texts of the training examples, the unlabelled texts, and the synthetic ones.
      labels: (n,) the labels of the training examples, -1 for all other texts; None for a task that generates.
      logits: (n, labels) of the teacher; None for a task that generates.
      answers: the answers of the training examples, and the teacher's answers to all other texts; None for a task with
        labels.
      counts: number of texts of each kind, and numbers of those that were left out, by reason.
    """

    texts: list[str]
    labels: np.ndarray | None
    logits: np.ndarray | None
    answers: list[str] | None
    counts: dict[str, Any]


def teach(
    folder: Path, teacher: Decoder, ids: TaskIds, task: Task, augment: Augmentation | None, *, length: int, seed: int
) -> TeacherLabels:
    """Runs the teacher on everything that a student learns from, and stores the result in ``taught.npz`` of the folder.

    A stored result is read instead, unless it was made with another teacher, task, option or version of the code; then
    a message says so and the teacher is run again.

    Args:
      folder: run directory of the teacher.
      teacher: the model.
      ids: token ids of the teacher.
      task: the task.
      augment: synthetic questions, or answers by majority vote. None: no synthetic questions, and one greedy answer.
      length: tokens of the rows that the teacher reads.
      seed: seed of the sampling.
    """
    asked: dict[str, Any] = {"teacher": model_digest(teacher), "ids": ids.fingerprint, "task": task.fingerprint}
    asked |= {"augment": to_json(augment), "length": length, "seed": seed}
    asked["code"] = code_identity(teacher.config, rooms=ROOMS)
    path = folder / "taught.npz"
    if path.exists():
        with np.load(path) as file:
            said = json.loads(str(file["said"]))
            before = said.pop("asked")
            reason = other_origin(before if isinstance(before, dict) else {}, asked)
            if reason is None:
                arrays = {name: file[name] for name in ("labels", "logits") if name in file}
                return TeacherLabels(**said, **{"labels": None, "logits": None} | arrays)
            console.print(f"{path} was made with {reason}; asking the teacher again", markup=False)
    found = (_soft_labels if task.labels else _answers)(teacher, ids, task, augment, length, seed)
    said = {"asked": asked, "texts": found.texts, "answers": found.answers, "counts": found.counts}
    arrays: dict[str, Any] = {"labels": found.labels, "logits": found.logits, "said": json.dumps(said)}
    unfinished = path.with_name("taught.incomplete.npz")
    np.savez(unfinished, **{name: a for name, a in arrays.items() if a is not None})
    os.replace(unfinished, path)
    return found


def student_items(ids: TaskIds, teacher_labels: TeacherLabels, length: int) -> list[Item]:
    """The items that a student is trained on; synthetic questions of more than ``length`` tokens are left out."""
    if teacher_labels.answers is None:
        items = questions(ids, teacher_labels.texts, teacher_labels.labels, teacher_labels.logits)
        given = teacher_labels.counts["labelled"] + teacher_labels.counts["unlabelled"]
        synthetic = [item for item in items[given:] if len(item) <= length]
        if n := len(items) - given - len(synthetic):
            console.print(f"left out: {n} synthetic questions of more than {length} tokens", markup=False)
        return items[:given] + synthetic
    return completions(
        ids, [Example(t, a, 0) for t, a in zip(teacher_labels.texts, teacher_labels.answers, strict=True)]
    )


def _soft_labels(
    teacher: Decoder, ids: TaskIds, task: Task, augment: Augmentation | None, length: int, seed: int
) -> TeacherLabels:
    loss, texts = task_loss(ids), task.texts("train") + task.texts("unlabelled")
    assert loss is not None  # the task has labels
    counts: dict[str, Any] = {"labelled": len(task.train), "unlabelled": len(task.unlabelled)}
    labels, logits = np.full(len(texts), -1, np.int32), predict(teacher, loss, questions(ids, texts), length=length)
    labels[: len(task.train)] = task.numbers(task.train)
    if augment is not None:
        known = texts + task.texts("test") + task.texts("validation")
        longest = int(np.quantile([len(tokens) for tokens, _ in ids.encode(texts)], LONGEST_TEXT))
        made = synthesise(teacher, ids, loss, augment, known, length=length, longest=longest, seed=seed)
        texts, logits = texts + made.texts, np.concatenate([logits, made.logits])
        labels = np.concatenate([labels, np.full(len(made.texts), -1, np.int32)])
        counts["made up"] = made.counts
    return TeacherLabels(texts, labels, logits, None, counts)


def _answers(
    teacher: Decoder, ids: TaskIds, task: Task, augment: Augmentation | None, length: int, seed: int
) -> TeacherLabels:
    prompts, longest = task.texts("unlabelled"), longest_answer(ids, task)
    counts: dict[str, Any] = {"labelled": len(task.train), "unlabelled": len(prompts)}
    found: list[str | None] = []
    if prompts and augment is None:
        found = list(answer(teacher, ids, prompts, longest=longest))
    elif prompts and augment is not None:
        found, counts["answers"] = agreed_answers(teacher, ids, prompts, augment, longest=longest, seed=seed)
    pairs = [*zip(task.texts("train"), answers(task.train), strict=True)] + [
        (t, a) for t, a in zip(prompts, found, strict=True) if a
    ]
    return TeacherLabels([t for t, _ in pairs], None, None, [a for _, a in pairs], counts)
