"""Starts a run from the model of another run, in another form: as a mixture of experts, or of depths."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from flax import nnx

import efftrain
from efftrain.experiment.experiment import Experiment
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.sharding import hosts
from efftrain.train.run.directory import check_model, has_begun, load_model_config


class Convert(Protocol):
    """Returns a model of ``config`` made from another model; ``rngs`` are for what is new in it."""

    def __call__(self, model: Decoder, config: ModelConfig, /, *, rngs: nnx.Rngs) -> Decoder: ...


def conversion(
    config: Experiment, run: Path | None, check: Callable[[ModelConfig, ModelConfig], None], convert: Convert
) -> Callable[[], Decoder] | None:
    """Returns the function ``initial`` of ``train_and_score``, which converts the model of a run.

    Args:
      config: configuration of the new run; its seed gives the random keys.
      run: the run to start from. None: there is none, and None is returned.
      check: raises an error if a model of the first configuration cannot become one of the second.
      convert: does the conversion.

    Raises:
      EfftrainError: the new run has not begun, and the other one cannot be loaded or converted.
    """
    if run is None:
        return None
    hosts.connect()
    if not has_begun(config.out):
        check(load_model_config(run), config.model)
        check_model(run)
    return lambda: convert(efftrain.load(run), config.model, rngs=nnx.Rngs(config.training.seed))
