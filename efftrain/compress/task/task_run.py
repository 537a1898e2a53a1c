"""Training runs on a task: the training items, the run directory and the scores of the model."""

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
from efftrain.data.tasks.task import Example, Task, answers
from efftrain.errors import ConfigError
from efftrain.interop.announce import announce_export
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.quality.task_scores import classification, exact_match
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.vocabulary import with_vocabulary
from efftrain.train.config import Training
from efftrain.train.inputs import content
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.run.directory import Run, check_model, has_begun, load_model_config
from efftrain.train.run.tokenizers import check_same_tokenizer, find_tokenizer

LONGEST_ANSWER = 1.5  # the longest answer that is generated, over the longest of the training examples, in tokens


@dataclass(frozen=True, kw_only=True)
class Learner:
    """A model for a task, and how it is trained.

    Attributes:
      model: configuration of the model; its vocabulary size is replaced by that of the task's tokenizer.
      training: the training configuration.
      vocabulary: number of entries of the tokenizer that is trained on the task's texts. It has no effect for a teacher
        that starts from a general model and uses that model's tokenizer.
      word_dropout: probability that a word of a question is left out, drawn again each time that the question is read.
      text_weight: weight of the loss on the text of the questions.
    """

    model: ModelConfig
    training: Training
    vocabulary: int = 1024
    word_dropout: float = 0.25
    text_weight: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TaskRun:
    """The configuration of one run on a task.

    Attributes:
      model, training: the resolved configurations.
      learner: the learner that they were made from.
      loss: the loss on labels; None for a task that generates answers.
      made_from: fingerprints of the examples, the vocabulary and the teacher's predictions.
    """

    model: ModelConfig
    training: Training
    learner: Learner
    loss: TaskLoss | None
    made_from: dict[str, str] = field(default_factory=dict)


def task_ids(task: Task, learner: Learner) -> TaskIds:
    """The task's token ids, with a tokenizer trained on its training and unlabelled texts, but not on its test texts.

    Args:
      task: the task.
      learner: says how many entries the tokenizer has.
    """
    examples = [*task.train, *task.unlabelled]
    texts = [e.text for e in examples]
    if not task.labels:
        texts += [e.answer for e in examples if e.answer is not None]
    return TaskIds(train_tokenizer(texts, learner.vocabulary), task.labels)


def general_ids(general: Path, task: Task, tokenizer: Path | None = None) -> TaskIds:
    """The task's token ids, with the tokenizer of a general model.

    Args:
      general: run directory of the general model.
      task: the task.
      tokenizer: path of the model's tokenizer. None: that of the run, or of the corpus that the run names.

    Raises:
      ConfigError: no tokenizer was found, its size is not that of the model's vocabulary, or the given tokenizer
        differs from that of the run.
    """
    size = load_model_config(general).vocab_size
    own = find_tokenizer(Path(general))
    if tokenizer is not None and own is not None:
        check_same_tokenizer(own, tokenizer, general, tokenizer)
    tokenizer = tokenizer or own
    if tokenizer is None:
        raise ConfigError(f"no tokenizer.json was found for {general} or its corpus; give one with --tokenizer")
    found = load_tokenizer(tokenizer)
    if vocabulary_size(found) != size:
        raise ConfigError(
            f"{tokenizer} has {vocabulary_size(found)} entries and the model of {general} has {size}; give the "
            "tokenizer that the model was trained with"
        )
    return TaskIds(found, task.labels, marked_end_of_text(tokenizer))


def task_loss(ids: TaskIds, **options: float) -> TaskLoss | None:
    """The loss of a task with labels, with further fields of ``TaskLoss``; None for a task that generates answers."""
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
    """Trains a model on a task, or continues its run, and writes ``ids`` into the run directory.

    Args:
      out: run directory.
      learner: the model and how it is trained.
      ids: token ids of the task, with the tokenizer.
      task: the task, whose validation examples are scored.
      items: what the model is trained on.
      loss: the loss on labels. None: next-token loss on the answers, for a task that generates.
      general: run directory of a model whose parameters the training starts from. None: random parameters.
      made_from: fingerprints of what the items were made from in addition to the task.

    Returns:
      The model, and its figures: ``train_flops``, and those on the validation examples.

    Raises:
      ConfigError: ``training.finetune`` is set.
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
    if not has_begun(out):
        announce_export(model)
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
    """The items that a teacher is trained on; if ``makes_up``, also texts after their label, to learn to write them."""
    return _gold(ids, task) + (conditionals(ids, task.texts("train"), task.numbers(task.train)) if makes_up else [])


def plain_items(ids: TaskIds, task: Task) -> list[Item]:
    """The items that a student without a teacher is trained on."""
    return _gold(ids, task)


def scores(model: Decoder, ids: TaskIds, examples: Sequence[Example], task: Task, length: int) -> dict[str, float]:
    """Scores a model's answers: ``task_scores.classification`` for a task with labels, otherwise ``exact_match``.

    Args:
      model: the model.
      ids: token ids of the task.
      examples: the examples to score.
      task: the task.
      length: tokens of a row in which questions are read; longer questions lengthen it.
    """
    if not task.labels:
        found = answer(model, ids, _texts(examples), longest=longest_answer(ids, task))
        return {"exact_match": exact_match(found, answers(examples))}
    items, loss = questions(ids, _texts(examples)), task_loss(ids)
    assert loss is not None  # the task has labels
    length = max(length, *(len(item) for item in items))
    return classification(predict(model, loss, items, length=length), task.numbers(examples))


def longest_answer(ids: TaskIds, task: Task) -> int:
    """Maximum number of tokens of a generated answer."""
    return int(LONGEST_ANSWER * max(len(tokens) for tokens, _ in ids.encode(answers(task.train)))) + 1


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
