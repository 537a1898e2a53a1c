"""Training that makes up for what was cut out of a model."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

import efftrain
from efftrain.compress.distillation.distill import Distill, distilled, forward_flops, teacher_run
from efftrain.compress.pruning.sparsify import hold_zeros
from efftrain.config import from_json
from efftrain.errors import ConfigError
from efftrain.experiment.experiment import Experiment, train_and_score
from efftrain.measure.scorecard.scorecard import Scorecard
from efftrain.models.decoder import Decoder
from efftrain.recipe import import_script
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.run.directory import load_model_config, read_json
from efftrain.train.schedules import WarmupStableDecay

# Of the run's peak learning rate. A cut of a third (recipes/prune.py, seed 0) cost 4.1, 3.4, 3.2
# and 3.5 % after 0.15, 0.3, 0.6 and 1 with a cosine; 3.0 % after 0.6, constant and then falling over half of the steps.
# Zeros hurt less: at 50 % by magnitude 0.6 % after 0.6, 0.3 % after 0.3.
PEAK, PEAK_SPARSE = 0.6, 0.3
DECAY = 0.5  # of the steps; behind it the model is done, and so only in the last round


@dataclass(frozen=True, kw_only=True)
class Recovery(Experiment):
    """A run that goes on from a model that was cut.

    Attributes:
      source: the run directory of that model.
      sparse: what is zero there stays zero.
      rows: of the validation split, that it is evaluated on at the end. None: all.
      teacher: the run directory of the model that it learns from. None: it learns from the text.
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
    """Trains the model of a run for its next token or by the distributions of a teacher, or continues.

    Source: Muralidharan et al. 2024 (Minitron); for masks, Renda et al. 2020 (learning-rate rewinding).

    Args:
      source: the run directory of the model that was cut.
      training: see ``recovery_training``.
      out: the run directory.
      corpus: of the text.
      sparse, rows, teacher: see ``Recovery``.
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

    def build(rngs: nnx.Rngs) -> Decoder:
        return Decoder(config.model, rngs=rngs)

    objective, extra_flops = next_token_loss, 0.0
    if teacher is not None:
        taught = teacher_run(teacher, corpus)
        build, objective = distilled(build, config.model, Distill(), taught)
        extra_flops = forward_flops(taught.config, training.length)
    _, card = train_and_score(
        config,
        build,
        objective,
        wrap,
        extra_flops=extra_flops,
        initial=lambda: efftrain.load(source),
        source=source,
        evaluated_rows=rows,
        script=source / "recipe.py",
    )
    return card


def recovery_training(run: Path, tokens: int, *, sparse: bool, number: int = 1, last: bool = True) -> Training:
    """How a model is trained that makes up for a cut: with a part of the peak learning rate, which falls at the end.

    Args:
      run: in which the whole model was trained.
      tokens: at least one step's.
      sparse: the cut left zeros.
      number: of the round: another order of the text in each.
      last: no round follows.

    Raises:
      ConfigError: there are too few tokens.
    """
    value = read_json(run / "config.json")["training"]
    script = import_script(run / "recipe.py") if ".py:" in json.dumps(value) else None
    before: Training = from_json(value, script=script)
    steps = tokens // (before.batch_size * before.length)
    if steps < 1:
        raise ConfigError(
            f"--recover leaves {tokens} tokens for a round or a trial, and a step has "
            f"{before.batch_size * before.length}; give more, or fewer --rounds"
        )
    return replace(
        before,
        steps=steps,
        optimizer=replace(before.optimizer, peak_lr=(PEAK_SPARSE if sparse else PEAK) * before.optimizer.peak_lr),
        schedule=WarmupStableDecay(warmup=0.05, decay=DECAY if last else 0.0),
        seed=before.seed + number,
        ema_decay=None,  # of so few steps it would be the model as it was cut
        mesh=MeshConfig(),
        eval_every=None,
        checkpoint_every=max(min(before.checkpoint_every, steps // 4), 1),
        keep_every=None,
        checkpoints=None,
        branch=None,
        branch_schedule=None,
        finetune=None,
        profile=None,
    )
