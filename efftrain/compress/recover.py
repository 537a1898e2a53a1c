"""Healing: training that recovers the quality that pruning cost."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

import efftrain
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.distillation.distill import Distill, distilled, teacher_run
from efftrain.compress.pruning.sparsify import hold_zeros
from efftrain.config import from_json
from efftrain.errors import ConfigError
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.decoder import Decoder
from efftrain.recipe import import_script
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective, next_token_loss
from efftrain.train.objectives.teacher import TeacherObjective
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import load_model_config, read_json
from efftrain.train.schedules import WarmupStableDecay

# Shares of the run's peak learning rate. Of those tried after a cut of a third (recipes/prune.py) PEAK was best, with a
# rate that is constant and then decays; zeros hurt the model less and do better with a lower rate.
PEAK, PEAK_SPARSE = 0.6, 0.3
DECAY = 0.5  # share of the steps; only in the last round, because the rate must stay high for the rounds to come


@dataclass(frozen=True, kw_only=True)
class Recovery(Experiment):
    """The configuration of a run that trains a pruned model.

    Attributes:
      source: run directory of the pruned model.
      sparse: whether the weights that are zero in that model stay zero.
      rows: number of rows of the validation split for the evaluation at the end. None: all.
      teacher: run directory of the teacher. None: next-token training on the text.
    """

    source: Path
    sparse: bool
    rows: int | None = None
    teacher: Path | None = None


def recover(
    source: Path,
    training: Training,
    out: Path,
    corpus: Path,
    *,
    sparse: bool,
    rows: int | None = None,
    teacher: Path | None = None,
) -> Scorecard:
    """Trains a pruned model on the text or with a teacher's distributions; continues the run if it was interrupted.

    Args:
      source: run directory of the pruned model.
      training: see ``recovery_training``.
      out: run directory of the trained model.
      corpus: the corpus that it is trained and evaluated on.
      sparse, rows, teacher: see ``Recovery``.

    Returns:
      The scorecard of the trained model.

    Source: Muralidharan et al. 2024 (Minitron); for masks, Renda et al. 2020 (learning-rate rewinding).
    """
    config = Recovery(
        model=load_model_config(source),
        training=training,
        corpus=corpus,
        out=out,
        source=source,
        sparse=sparse,
        rows=rows,
        teacher=teacher,
    )
    wrap = hold_zeros().around(training) if sparse else None

    def plain(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    build: Callable[[nnx.Rngs], Decoder] = plain
    objective: Objective | TeacherObjective = next_token_loss
    if teacher is not None:
        build, objective = distilled(plain, config.model, Distill(), teacher_run(teacher, corpus))
    _, card = train_and_score(
        config,
        build,
        objective,
        wrap,
        initial=lambda: efftrain.load(source),
        source=source,
        evaluated_rows=rows,
        script=source / "recipe.py",
    )
    return card


def recovery_training(
    run: Path,
    tokens: int,
    options: RecoveryTraining,
    *,
    length: int,
    sparse: bool,
    number: int = 1,
    last: bool = True,
) -> Training:
    """The training configuration for a pruned model: a part of the run's peak learning rate, which decays at the end.

    Args:
      run: directory of the run in which the original model was trained, or into which it was imported; in the latter
        case the training is that of ``Training`` with AdamW.
      tokens: number of tokens to train on; at least one step.
      options: may set the learning rate and the batch size, which an imported model needs.
      length: tokens of a row.
      sparse: whether the pruning left zeros; the peak is then lower.
      number: number of the round, from 1; it is added to the seed, so that every round reads the text in another order.
      last: whether this is the last round; only then the learning rate decays.

    Raises:
      ConfigError: there are fewer tokens than one step has, or a model that was imported has no learning rate or batch
        size.
    """
    before, batch_size = _training_of(run, options), options.batch_size
    batch_size = batch_size or before.batch_size
    steps = tokens // (batch_size * length)
    if steps < 1:
        raise ConfigError(
            f"--recovery-tokens leaves {tokens} tokens for each round or trial, and one step takes "
            f"{batch_size * length}; give more tokens, or fewer --rounds"
        )
    peak = options.learning_rate or (PEAK_SPARSE if sparse else PEAK) * before.optimizer.peak_lr
    return replace(
        before,
        steps=steps,
        batch_size=batch_size,
        length=length,
        n_microbatches=before.n_microbatches if options.batch_size is None else 1,
        optimizer=replace(before.optimizer, peak_lr=peak),
        schedule=WarmupStableDecay(warmup=0.05, decay=DECAY if last else 0.0),
        seed=before.seed + number,
        ema_decay=None,  # over so few steps the average would stay close to the model before the training
        mesh=MeshConfig(),
        eval_every=None,
        checkpoint_every=max(min(before.checkpoint_every, steps // 4), 1),
        keep_every=None,
        checkpoints=None,
        resume_from=None,
        resume_schedule=None,
        finetune=None,
        profile=None,
    )


def _training_of(run: Path, options: RecoveryTraining) -> Training:
    """The training configuration of a run, or, of a run that was imported, that of AdamW with what the options say."""
    value = read_json(run / "config.json").get("training", {})
    if "optimizer" in value:
        script = import_script(run / "recipe.py") if ".py:" in json.dumps(value) else None
        return from_json(value, script=script)
    if options.learning_rate is None or options.batch_size is None:
        given = {"--learning-rate 1e-5": options.learning_rate, "--batch-size 16": options.batch_size}
        missing = " ".join(flag for flag, value in given.items() if value is None)
        raise ConfigError(
            f"the configuration of {run} does not say how its model was trained, because it was imported; give the "
            f"recovery training (AdamW) what it cannot know, such as {missing}"
        )
    return Training(steps=1, batch_size=options.batch_size, length=1, optimizer=AdamW(peak_lr=options.learning_rate))
