"""Runs of a task: what a model is trained on, its run directory, and how good it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flax import nnx

import efftrain
from efftrain.compress.task.task import TaskLoss, predict
from efftrain.compress.task.task_texts import answer
from efftrain.data.storage.tokenizer import load_tokenizer, marked_end_of_text, train_tokenizer, vocabulary_size
from efftrain.data.tasks.items import Item, TaskIds, completions, conditionals, questions
from efftrain.data.tasks.rows import TaskBatches
from efftrain.data.tasks.task import Example, Task
from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.quality.task_scores import classification, exact_match
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.vocabulary import with_vocabulary
from efftrain.train.config import Training
from efftrain.train.inputs import content
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.run.directory import Run, check_model, load_model_config
from efftrain.train.run.tokenizers import check_same_tokenizer, find_tokenizer

LONGEST_ANSWER = 1.5  # times the longest of the examples, in tokens


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model of a task, and how it is trained.

    Attributes:
      model: its vocabulary is made from the task and replaced.
      training: see there.
      vocabulary: entries of a tokenizer that is trained on the task's texts. Of a teacher that starts from a general
        model, that model's counts.
      word_dropout: chance of a word of a question to be left out, anew each time that it is read.
      text_weight: of the loss on the questions' text.
    """

    model: ModelConfig
    training: Training
    vocabulary: int = 1024
    word_dropout: float = 0.25
    text_weight: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """The configuration of one run.

    Attributes:
      model, training: resolved.
      learner: what they were made from.
      loss: None of a task that generates.
      made_from: fingerprints of the examples, of the vocabulary and of the teacher's opinions.
    """

    model: ModelConfig
    training: Training
    learner: Learner
    loss: TaskLoss | None
    made_from: dict[str, str] = field(default_factory=dict)


def task_ids(task: Task, learner: Learner) -> TaskIds:
    """With a tokenizer that is trained on the texts of the task, but those of the test."""
    examples = [*task.train, *task.unlabelled]
    texts = [e.text for e in examples]
    if not task.labels:
        texts += [e.answer for e in examples if e.answer is not None]
    return TaskIds(train_tokenizer(texts, learner.vocabulary), task.labels)


def general_ids(general: Path, task: Task, tokenizer: Path | None = None) -> TaskIds:
    """With a general model's tokenizer: that of its run, of the corpus that the run names, or else the given one.

    Raises:
      ConfigError: there is none, it has another number of entries than the model, or the given one differs from the
        run's.
    """
    size = load_model_config(general).vocab_size
    own = find_tokenizer(Path(general))
    if tokenizer is not None and own is not None:
        check_same_tokenizer(own, tokenizer, general, tokenizer)
    tokenizer = tokenizer or own
    if tokenizer is None:
        raise ConfigError(
            f"neither {general} nor its corpus has a tokenizer.json that is here; give it with --tokenizer"
        )
    found = load_tokenizer(tokenizer)
    if vocabulary_size(found) != size:
        raise ConfigError(
            f"{tokenizer} has {vocabulary_size(found)} entries and the model of {general} {size}; give the tokenizer "
            "that it was trained with"
        )
    return TaskIds(found, task.labels, marked_end_of_text(tokenizer))


def task_loss(ids: TaskIds, **options: float) -> TaskLoss | None:
    """None of a task that generates."""
    return TaskLoss(first_label=ids.first_label, n_labels=len(ids.labels), **options) if ids.labels else None


def train_on_task(
    out: Path,
    learner: Learner,
    ids: TaskIds,
    task: Task,
    items: Sequence[Item],
    loss: TaskLoss | None,
    *,
    general: Path | None = None,
    made_from: dict[str, str] | None = None,
) -> tuple[Decoder, dict[str, float]]:
    """Trains, or continues what the directory holds; ``ids`` are left in it.

    Args:
      out: the run directory.
      items: what is trained on.
      loss: None: next-token loss on the answers, of a task that generates.
      general: the run of a model to start from. None: at random.
      made_from: what the items were made from beside the task.

    Returns:
      The model; ``train_flops``, and its figures on the validation examples.
    """
    training = learner.training
    if training.finetune is not None:
        raise ConfigError("training.finetune is set, and a task has a vocabulary of its own; use --general")
    model = learner.model if general is None else load_model_config(general)
    model = model.replace(vocab_size=ids.size, max_length=max(model.max_length, training.length))
    config = TaskRun(
        model=model,
        training=training,
        learner=learner,
        loss=loss,
        made_from={"task": task.fingerprint, "ids": ids.fingerprint} | (made_from or {}),
    )
    if general is not None:
        check_model(general)
    found = None if general is None else content(general)
    run = Run(out, config, inputs={} if found is None else {"general": found})
    ids.write(run.path)
    flops = training_flops(abstract_decoder(model), training.length, steps=training.steps)
    objective: Objective = next_token_loss if loss is None else loss
    fitted = fit(
        lambda rngs: Decoder(model, rngs=rngs),
        objective,
        TaskBatches(
            items,
            length=training.length,
            batch_size=training.batch_size,
            seed=training.seed,
            n_labels=len(ids.labels),
            word_dropout=learner.word_dropout,
        ),
        training,
        run,
        initial=None if general is None else lambda: _grown(general, model, training.seed),
        evaluate=lambda decoder: scores(decoder, ids, task.validation, task, training.length),
        flops_per_token=flops,
    )
    kept = {name: value for name, value in (fitted.evaluation or {}).items() if name not in ("step", "split")}
    return fitted.model, {"train_flops": flops * training.tokens} | {f"validation_{k}": v for k, v in kept.items()}


def teacher_items(ids: TaskIds, task: Task, *, makes_up: bool) -> list[Item]:
    """What a teacher is trained on; with texts behind labels where it is to make some up."""
    return _gold(ids, task) + (conditionals(ids, task.texts("train"), task.numbers(task.train)) if makes_up else [])


def plain_items(ids: TaskIds, task: Task) -> list[Item]:
    """What a student without teacher is trained on."""
    return _gold(ids, task)


def scores(model: Decoder, ids: TaskIds, examples: Sequence[Example], task: Task, length: int) -> dict[str, float]:
    """How good a model's answers are: ``task_scores.classification``, or ``exact_match``."""
    if not task.labels:
        found = answer(model, ids, _texts(examples), longest=longest_answer(ids, task))
        return {"exact_match": exact_match(found, [e.answer for e in examples])}
    items = questions(ids, _texts(examples))
    length = max(length, *(len(item) for item in items))
    return classification(predict(model, task_loss(ids), items, length=length), task.numbers(examples))


def longest_answer(ids: TaskIds, task: Task) -> int:
    """Tokens that an answer may have."""
    return int(LONGEST_ANSWER * max(len(tokens) for tokens, _ in ids.encode([e.answer for e in task.train]))) + 1


def _gold(ids: TaskIds, task: Task) -> list[Item]:
    if task.labels:
        return questions(ids, task.texts("train"), task.numbers(task.train))
    return completions(ids, task.train)


def _grown(general: Path, model: ModelConfig, seed: int) -> Decoder:
    return with_vocabulary(
        efftrain.load(general), model.vocab_size, max_length=model.max_length, rngs=nnx.Rngs(params=seed)
    )


def _texts(examples: Sequence[Example]) -> list[str]:
    return [example.text for example in examples]
