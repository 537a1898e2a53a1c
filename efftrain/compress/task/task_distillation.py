"""Distillation for one task with one seed: a teacher, its student, and the same student without a teacher."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from efftrain.compress.in_memory import convert_run
from efftrain.compress.task.task_run import (
    Learner,
    general_ids,
    plain_items,
    scores,
    task_ids,
    task_loss,
    teacher_items,
    train_on_task,
)
from efftrain.compress.task.task_teach import TeacherLabels, student_items, teach
from efftrain.compress.task.task_texts import Augmentation
from efftrain.config import digest
from efftrain.data.tasks.items import TaskIds
from efftrain.data.tasks.task import Task
from efftrain.measure.cost.task_cost import cost, seconds_to_answer, size
from efftrain.measure.measurements import Measurements
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer


@dataclass(frozen=True, kw_only=True)
class TaskDistillation:
    """How a student learns a task from a teacher.

    Attributes:
      teacher, student: models and their training.
      general: run directory of a general model that the teacher starts from. None: random parameters.
      tokenizer: path of the general model's tokenizer. None: that of its run, or of the corpus that its run names.
      alpha: weight of the teacher's distribution in the student's loss.
      temperature: temperature at which the distributions are compared.
      augment: how the teacher generates questions, or chooses an answer by majority vote.
      augmented: whether it does. False: it only labels the questions that are there.
    """

    teacher: Learner
    student: Learner
    general: Path | None = None
    tokenizer: Path | None = None
    alpha: float = 0.9
    temperature: float = 2.0
    augment: Augmentation = field(default_factory=Augmentation)
    augmented: bool = True


def distil_task(
    config: TaskDistillation, task: Task, out: Path, *, seed: int, store: Measurements
) -> dict[str, dict[str, float]]:
    """Trains a teacher, its student and a plain student on a task, or continues their runs, and measures them.

    Args:
      config: models, training and distillation.
      task: the examples.
      out: the folder of the runs ``teacher-seedN``, ``student-seedN`` and ``plain-seedN``.
      seed: seed of all runs.
      store: keeps the measurements, and what the teacher made for the student as ``taught, seed N``.

    Returns:
      Figures of ``teacher``, ``student``, ``plain student`` and ``student, 8 bits`` (the student stored in 8 bits):
      scores on the test examples and on the validation examples, training FLOPs, size, FLOPs and seconds of an answer.
    """
    teacher, student = (_seeded(learner, seed) for learner in (config.teacher, config.student))
    ids = task_ids(task, teacher) if config.general is None else general_ids(config.general, task, config.tokenizer)
    augment = config.augment if config.augmented else None
    folder = out / f"teacher-seed{seed}"
    big, spent = train_on_task(
        folder,
        teacher,
        ids,
        task,
        teacher_items(ids, task, makes_up=augment is not None and bool(task.labels)),
        task_loss(ids, text_weight=teacher.text_weight),
        general=config.general,
        made_from={"general": str(config.general)},
    )
    taught = teach(folder, big, ids, task, augment, length=teacher.training.length, seed=seed)
    store.cell(f"taught, seed {seed}", lambda: taught.counts)
    models: dict[str, tuple[Decoder, TaskIds]] = {"teacher": (big, ids)}
    training: dict[str, dict[str, float]] = {"teacher": spent}
    own = task_ids(task, student)
    for name, items, alpha in (
        ("student", student_items(own, taught, student.training.length), config.alpha),
        ("plain student", plain_items(own, task), 0.0),
    ):
        loss = task_loss(own, text_weight=student.text_weight, alpha=alpha, temperature=config.temperature)
        run = out / f"{name.split()[0]}-seed{seed}"
        made_from = {"taught": _fingerprint(taught)} if name == "student" else {}
        small, training[name] = train_on_task(run, student, own, task, items, loss, made_from=made_from)
        models[name] = (small, own)
    rule = QuantizationRule(layers="blocks/.*|embedding", weights=Integer(bits=8))
    models["student, 8 bits"] = (convert_run(out / f"student-seed{seed}", None, Quantization(rules=(rule,))), own)
    times = store.cell(f"latency, seed {seed}", lambda: seconds_to_answer(task, models))

    def figures(name: str) -> dict[str, float]:
        model, ids = models[name]
        found = scores(model, ids, task.test, task, (teacher if name == "teacher" else student).training.length)
        found |= training.get(name, {}) | size(model) | cost(task, model, ids)
        return found | {"latency_s": times[name]}

    return {name: store.cell(f"{name}, seed {seed}", lambda name=name: figures(name)) for name in models}


def _seeded(learner: Learner, seed: int) -> Learner:
    return replace(learner, training=replace(learner.training, seed=seed))


def _fingerprint(taught: TeacherLabels) -> str:
    """A fingerprint of what a student learns from."""
    logits = None if taught.logits is None else np.round(taught.logits, 2).tolist()
    return digest({"texts": taught.texts, "answers": taught.answers, "logits": logits})
