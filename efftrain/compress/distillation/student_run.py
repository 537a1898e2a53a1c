"""One run of a student on a corpus: its objective, its start from the teacher, and the training."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from flax import nnx

import efftrain
from efftrain import data
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.distillation.distill import Distill, FromCache, FromTeacher, distilled, teacher_run
from efftrain.compress.distillation.student import cut_from, from_layers, same_parameters, spread_layers
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.errors import ConfigError
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.train.inputs import model_digest
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.objectives.teacher import Teacher, TeacherObjective

Start = Literal["random", "layers", "cut"]
CALIBRATION_ROWS = 128  # rows of the training split, for the start "cut"


@dataclass(frozen=True, kw_only=True)
class StudentRun(Experiment):
    """The configuration of a student and its training on a corpus.

    Attributes:
      distill: what the student learns from its teacher. None: nothing; it is trained on the text alone.
      teacher: run directory of the teacher. None: it is not trained yet.
      teacher_dtype: dtype of the teacher's matrices while it teaches; since it is frozen, bfloat16 is enough. None: as
        they are stored.
      cache: the teacher's predictions for the rows that the student reads, from ``efftrain teacher``. None: the teacher
        reads every batch too.
      rows: number of rows of the training split that are read, from the first one on. None: all, or those of the cache.
      initial: the student starts from random parameters, from layers of its teacher ("layers", of the same width), or
        from the most important parts of it ("cut", of the same head size).
    """

    distill: Distill | None = field(default_factory=Distill)
    teacher: Path | None = None
    teacher_dtype: str | None = None
    cache: Path | None = None
    rows: int | None = None
    initial: Start = "random"


def student_program(
    config: StudentRun, *, untrained: ModelConfig
) -> tuple[Callable[[nnx.Rngs], Decoder], Objective | FromTeacher | FromCache]:
    """Returns what ``fit`` trains: the function that builds the student, and its objective.

    Args:
      config: configuration of the run.
      untrained: configuration of the teacher if ``config.teacher`` is None, because it is not trained yet; enough to
        compile the program, but training raises ConfigError.

    Raises:
      ConfigError: teacher, cache and student do not fit each other.
    """

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    if config.distill is None:
        if config.cache is not None:
            raise ConfigError("a cache has no effect without a distillation loss; remove the cache, or give distill")
        return build, next_token_loss
    if config.cache is not None:
        cache = data.TeacherCache.open(config.cache, verify=False)
        if config.teacher is not None:
            cache.check_teacher(model_digest(efftrain.load(config.teacher)))
        return build, FromCache(how=config.distill, tail=cache.plan.kind == "top_k")
    if config.teacher is None:
        teacher = Teacher(config=untrained, restore=_not_trained, dtype=config.teacher_dtype)
    else:
        teacher = teacher_run(config.teacher, config.corpus, dtype=config.teacher_dtype)
    return distilled(build, config.model, config.distill, teacher)


def train_student(
    config: StudentRun,
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | TeacherObjective,
    *,
    evaluated_rows: int | None = None,
) -> Scorecard:
    """Trains a student, whose teacher must be there, and evaluates it; see ``train_and_score``.

    Args:
      config: configuration of the run.
      build, objective: see ``student_program``.
      evaluated_rows: number of rows of the validation split. None: all.

    Raises:
      EfftrainError: see ``train_and_score``, ``OnPolicy.check_text`` and ``initial_student``.
    """
    if config.distill is not None and config.distill.on_policy is not None:
        config.distill.on_policy.check_text(config.corpus)
    starts = config.initial != "random"
    return train_and_score(
        config,
        build,
        objective,
        part=data.Part(path=config.corpus, rows=config.rows, teacher=config.cache),
        initial=partial(initial_student, config) if starts else None,
        source=config.teacher if starts else None,
        evaluated_rows=evaluated_rows,
    )[1]


def initial_student(config: StudentRun) -> Decoder:
    """Builds the student before its first step out of its teacher, as ``config.initial`` says.

    Raises:
      ConfigError: a student of this configuration cannot be made of this teacher.
    """
    if config.teacher is None:
        raise ConfigError(f"initial is {config.initial} and there is no teacher; give --teacher RUN")
    pieces = LayerwiseModel.read(config.teacher)
    if config.initial == "cut":
        text = CorpusRows(config.corpus, config.training.length)
        return cut_from(pieces, config.model, text.calibration(CALIBRATION_ROWS))
    model = from_layers(pieces, spread_layers(config.model.n_layers, pieces.config.n_layers))
    if not same_parameters(model.config, config.model):
        raise ConfigError(
            "a student of its teacher's layers needs its teacher's widths; change model, or initialise it at random"
        )
    return model


def _not_trained(_: nnx.State) -> nnx.State:
    raise ConfigError("the student has no teacher yet; train one, or give --teacher RUN")
