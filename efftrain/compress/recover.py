"""Healing: training that recovers the quality that pruning cost."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

import efftrain
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


def recovery_training(run: Path, tokens: int, *, sparse: bool, number: int = 1, last: bool = True) -> Training:
    """The training configuration for a pruned model: a part of the run's peak learning rate, which decays at the end.

    Args:
      run: directory of the run in which the original model was trained.
      tokens: number of tokens to train on; at least one step.
      sparse: whether the pruning left zeros; the peak is then lower.
      number: number of the round, from 1; it is added to the seed, so that every round reads the text in another order.
      last: whether this is the last round; only then the learning rate decays.

    Raises:
      ConfigError: there are fewer tokens than one step has.
    """
    value = read_json(run / "config.json").get("training", {})
    if "optimizer" not in value:
        raise ConfigError(
            f"the configuration of {run} names no training.optimizer, because its model was imported, so that no "
            "learning rate is known for recovery; remove --recovery-tokens, or train the model with a recipe first"
        )
    script = import_script(run / "recipe.py") if ".py:" in json.dumps(value) else None
    before: Training = from_json(value, script=script)
    steps = tokens // (before.batch_size * before.length)
    if steps < 1:
        raise ConfigError(
            f"--recovery-tokens leaves {tokens} tokens for each round or trial, and one step takes "
            f"{before.batch_size * before.length}; give more tokens, or fewer --rounds"
        )
    return replace(
        before,
        steps=steps,
        optimizer=replace(before.optimizer, peak_lr=(PEAK_SPARSE if sparse else PEAK) * before.optimizer.peak_lr),
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
