"""Training that makes up for what was cut out of a model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flax import nnx

import efftrain
from efftrain.compress.sparsify import hold_zeros
from efftrain.config import from_json
from efftrain.errors import ConfigError
from efftrain.measure.experiment import Experiment, train_and_score
from efftrain.measure.scorecard import Scorecard
from efftrain.models.decoder import Decoder
from efftrain.recipe import import_script
from efftrain.train.loop import Training
from efftrain.train.objective import next_token_loss
from efftrain.train.run import load_model_config, read_json
from efftrain.train.schedules import Cosine

PEAK = 0.3  # of the peak learning rate that the run was trained with: it starts from its end, and is hurt
WARMUP = 0.1  # of the steps


@dataclass(frozen=True, kw_only=True)
class Recovery(Experiment):
    """A run that goes on from a model that was cut.

    Attributes:
      source: the run directory of that model.
      sparse: what is zero there stays zero.
      rows: of the validation split, for the figures at the end. None: all.
    """

    source: Path
    sparse: bool
    rows: int | None = None


def recover(
    source: Path, tokens: int, out: Path, corpus: Path, *, sparse: bool, number: int = 1, rows: int | None = None
) -> Scorecard:
    """Trains a run's model for so many tokens, or continues; the learning rate warms up and falls to zero.

    Source: Muralidharan et al. 2024 (Minitron); for masks, Renda et al. 2020 (learning-rate rewinding).

    Args:
      source: the run directory of the model that was cut.
      tokens: at least one step's.
      out: the run directory.
      corpus: of the text.
      sparse, rows: see ``Recovery``.
      number: of the round: another order of the text in each.
    """
    training = recovery_training(read_json(source / "config.json"), source, tokens, number)
    config = Recovery(
        model=load_model_config(source),
        training=training,
        corpus=corpus,
        out=out,
        source=source,
        sparse=sparse,
        rows=rows,
    )
    wrap = hold_zeros().around(training) if sparse else None
    build: Callable[[nnx.Rngs], Decoder] = lambda rngs: Decoder(config.model, rngs=rngs)  # noqa: E731
    return train_and_score(
        config, build, next_token_loss, wrap, initial=lambda: efftrain.load(source), evaluated_rows=rows
    )[1]


def recovery_training(settings: dict[str, Any], run: Path, tokens: int, number: int) -> Training:
    """How a run is trained that makes up for a cut, from the configuration (JSON) of the run that was cut."""
    script = import_script(run / "recipe.py") if (run / "recipe.py").exists() else None
    before: Training = from_json(settings["training"], script=script)
    steps = tokens // (before.batch_size * before.length)
    if steps < 1:
        raise ConfigError(
            f"--recover is {tokens}, less than the {before.batch_size * before.length} tokens of a step; give more"
        )
    return replace(
        before,
        steps=steps,
        optimizer=replace(before.optimizer, peak_lr=PEAK * before.optimizer.peak_lr),
        schedule=Cosine(warmup=WARMUP, final=0.0),
        seed=before.seed + number,
        eval_every=None,
        checkpoint_every=max(min(before.checkpoint_every, steps // 4), 1),
        keep_every=None,
        checkpoints=None,
        branch=None,
        profile=None,
    )
