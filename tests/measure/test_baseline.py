"""Baselines of runs: where they are, and from which of their checkpoints a run starts."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from efftrain.errors import ConfigError
from efftrain.experiment.baseline import baseline, resume_from_baseline
from efftrain.experiment.experiment import Experiment
from efftrain.models.config import llama
from efftrain.train.config import Training


@dataclass(frozen=True, kw_only=True)
class Sparse(Experiment):
    share: float = 0.5


TRAINING = Training(steps=2000, batch_size=2, length=8, checkpoint_every=200, keep_every=600, seed=3)
RUN = Sparse(
    model=llama(vocab_size=32, d_model=8, n_layers=1, n_heads=2, d_ff=8, max_length=8),
    training=TRAINING,
    corpus=Path("corpus"),
    out=Path("runs/sparse"),
)


def test_a_baseline_is_the_same_training_from_its_first_step():
    branched = replace(RUN, training=replace(TRAINING, resume_from="runs/x@100", resume_schedule="constant"))
    assert baseline(branched, "dense", share=0.0) == replace(RUN, out=Path("runs/dense-seed3"), share=0.0)


def test_a_run_starts_from_the_checkpoint_before_its_share_of_the_steps():
    config = replace(RUN, training=replace(TRAINING, finetune=Path("runs/other")))
    started = resume_from_baseline(config, baseline(config, "dense"), share=0.1)
    assert started.training.resume_from == "runs/dense-seed3@1800"
    assert started.training.finetune is None
    assert started.training.first_step == 1800
    assert TRAINING.first_step == 0


@pytest.mark.parametrize(
    ("share", "keep_every", "words"),
    [
        (0.2, 600, r"starts after step 1600 of runs/dense-seed3, which keeps no checkpoint of that step; set training"),
        (0.1, None, r"starts after step 1800"),
        (0.0, 600, r"share is 0\.0; give a number between 0 and 1"),
        (1.0, 600, r"share is 1\.0"),
    ],
)
def test_a_checkpoint_that_is_not_kept_is_an_error(share, keep_every, words):
    config = replace(RUN, training=replace(TRAINING, keep_every=keep_every))
    with pytest.raises(ConfigError, match=words):
        resume_from_baseline(config, baseline(config, "dense"), share=share)
