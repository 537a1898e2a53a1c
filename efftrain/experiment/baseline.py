"""Runs that share their beginning with a baseline: the baseline beside a run, and the run from its checkpoint."""

from dataclasses import replace
from typing import Any, TypeVar

from efftrain.errors import ConfigError
from efftrain.experiment.experiment import Experiment

AnyExperiment = TypeVar("AnyExperiment", bound=Experiment)


def baseline(config: AnyExperiment, name: str, **changes: Any) -> AnyExperiment:
    """Returns the configuration of a run's baseline: the same training, from its first step to its last.

    Args:
      config: configuration of the run.
      name: the baseline's directory is ``NAME-seedN``, beside that of the run.
      changes: fields of the configuration in which the baseline differs from the run.
    """
    training = replace(config.training, resume_from=None, resume_schedule=None)
    return replace(config, training=training, out=config.out.with_name(f"{name}-seed{training.seed}"), **changes)


def resume_from_baseline(config: AnyExperiment, baseline: Experiment, *, share: float) -> AnyExperiment:
    """Returns the configuration of a run that continues its baseline from a checkpoint near the end.

    Args:
      config: configuration of the run.
      baseline: configuration of the baseline, with as many steps.
      share: share of the steps that the run makes itself, after the checkpoint.

    Raises:
      ConfigError: the share is not between 0 and 1, or the baseline keeps no checkpoint at that step.
    """
    training = config.training
    if not 0 < share < 1:
        raise ConfigError(f"share is {share}; give a number between 0 and 1, such as 0.1")
    step = round((1 - share) * training.steps)
    if training.keep_every is None or step % training.keep_every:
        raise ConfigError(
            f"the run starts after step {step} of {baseline.out}, which keeps no checkpoint of that step; set "
            f"training.keep-every and training.checkpoint-every to divisors of {step}"
        )
    return replace(config, training=replace(training, resume_from=f"{baseline.out}@{step}", finetune=None))
