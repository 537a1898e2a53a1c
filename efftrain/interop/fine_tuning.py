"""Supervised fine-tuning (SFT): a run learns from conversations to give their answers."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from flax import nnx

from efftrain.data.tasks.rows import TaskBatches
from efftrain.errors import ConfigError
from efftrain.interop.announce import announce_export
from efftrain.interop.conversations import (
    ConversationFields,
    EncodedConversations,
    encode_conversations,
    read_conversations,
    rows_once,
)
from efftrain.interop.run_tokenizer import RunTokenizer, read_run_tokenizer
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.objective_flops import objective_flops
from efftrain.measure.quality.evaluate import Evaluator
from efftrain.measure.scorecard.score import score
from efftrain.measure.scorecard.scorecard import FILE_NAME, Scorecard
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.progress import console
from efftrain.sharding import hosts
from efftrain.train.batches import batch_part
from efftrain.train.config import Training
from efftrain.train.inputs import input_contents
from efftrain.train.loop import fit
from efftrain.train.objectives.objective import Objective
from efftrain.train.program import Wrap
from efftrain.train.run.directory import Run, has_begun, load_model_config
from efftrain.train.run.tokenizers import copy_tokenizer
from efftrain.train.start import check_start


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """The fields of a recipe that fine-tunes a run on conversations.

    Attributes:
      conversations: file of JSON lines with what the model learns from.
      held_out: such a file, on whose answers the model is evaluated. None: it is not evaluated.
      fields: which fields of the files hold the conversations.
      training: configuration of the training. ``finetune`` names the run, for example an imported one, whose model,
        tokenizer and chat template are used.
      packed: put several conversations into a row, which do not see one another. False: one conversation per row.
      model: configuration of the model; its parameters must be those of the run. None: that of the run.
      out: run directory; if it holds an unfinished run, the same command continues it.
    """

    conversations: Path
    held_out: Path | None = None
    fields: ConversationFields = field(default_factory=ConversationFields)
    training: Training
    packed: bool = True
    model: ModelConfig | None = None
    out: Path

    @property
    def source(self) -> Path:
        """The run that has the tokenizer and the model: the own one once it has begun, before that the one it is of.

        Raises:
          ConfigError: ``training`` names no run.
        """
        found = self.out if has_begun(self.out) else self.training.started_from
        if found is None:
            raise ConfigError("training.finetune names no run; give the run to fine-tune, such as an imported one")
        return found

    def with_model(self) -> "FineTuning":
        """Returns the configuration with the model of the run, if it names none."""
        return self if self.model is not None else replace(self, model=load_model_config(self.source))


def fine_tune(
    config: FineTuning,
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective,
    wrap: Wrap | None = None,
    *,
    script: Path | None = None,
) -> tuple[Decoder, Scorecard]:
    """Fine-tunes a model on conversations, evaluates it on held-out ones and writes ``scorecard.json`` into the run.

    A new run says first as what its model can be exported; an unfinished run is continued. The run keeps tokenizer,
    chat template and generation settings, so that it can be exported, and needs the run that it started from no longer.
    The quality on the scorecard is that of the answers alone: bits per byte of their text, and nats per token, the end
    of each answer included.

    Args:
      config: configuration of the run, from ``FineTuning.with_model``.
      build, objective, wrap: see ``fit``. The batches have the loss mask of the answers, for ``next_token_loss``.
      script: see ``Run``.

    Raises:
      EfftrainError: see ``fit``, ``Run`` and ``encode_conversations``.
    """
    hosts.connect()
    training, model = config.training, config.model
    if model is None:
        raise ConfigError("the configuration has no model; pass config.with_model()")
    if training.length > model.max_length:
        raise ConfigError(
            f"training.length is {training.length} and model.max_length is {model.max_length}; cut the rows"
        )
    with hosts.together():
        source, begun = config.source, has_begun(config.out)
        if not begun:
            check_start(training, model, None)
            announce_export(model)
        tokenizer = read_run_tokenizer(source)
        if tokenizer.vocabulary > model.vocab_size:
            raise ConfigError(
                f"the tokenizer of {source} has {tokenizer.vocabulary} entries and its model {model.vocab_size}; give "
                "the run the tokenizer that its model was trained with"
            )
    learnt = _encoded(config, tokenizer, config.conversations)
    part = batch_part(training)
    batches = TaskBatches(
        learnt.items,
        length=training.length,
        batch_size=training.batch_size,
        seed=training.seed,
        n_labels=0,
        part=part,
        per_row=None if config.packed else 1,
    )
    held_out = None if config.held_out is None else _encoded(config, tokenizer, config.held_out)
    evaluate = None if held_out is None else _evaluator(held_out, training, part)
    extra_flops = objective_flops(objective, model, training)
    flops = training_flops(abstract_decoder(model), training.length, steps=training.steps) + extra_flops
    with hosts.together():
        inputs = input_contents(config) if hosts.process_index() == 0 else {}
    run = Run(config.out, config, script=script, inputs=inputs)
    if hosts.process_index() == 0 and not begun:
        copy_tokenizer(source, run.path)
    fitted = fit(build, objective, batches, training, run, wrap=wrap, evaluate=evaluate, flops_per_token=flops)
    card = score(
        fitted.model,
        name=run.path.name,
        length=training.length,
        quality=fitted.evaluation,
        split="held out",
        note="" if held_out is None else f"the answers of {len(held_out.items):,} conversations",
        training_tokens=training.tokens,
        training_figures=fitted.figures,
        steps=training.steps,
        extra_flops=extra_flops,
        checkpoint=run.checkpoints / str(training.steps),
    )
    if hosts.process_index() == 0:
        card.write(run.path / FILE_NAME)
    run.close()
    return fitted.model, card


def _encoded(config: FineTuning, tokenizer: RunTokenizer, path: Path) -> EncodedConversations:
    found = encode_conversations(tokenizer, read_conversations(path, config.fields), length=config.training.length)
    n_tokens = sum(map(len, found.items))
    console.print(
        f"{path}: {len(found.items):,} conversations, {n_tokens:,} tokens, of which {found.n_targets:,} are of answers",
        markup=False,
    )
    return found


def _evaluator(held_out: EncodedConversations, training: Training, part: tuple[int, int]) -> Evaluator:
    rows = partial(rows_once, held_out.items, length=training.length, batch_size=training.batch_size, part=part)
    return Evaluator(rows, held_out.token_bytes)
