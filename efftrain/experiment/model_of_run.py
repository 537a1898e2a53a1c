"""The model of another run in place of a configuration's own, as ``--model-of`` and flags such as ``--upcycle`` ask."""

import types
from collections.abc import Mapping
from pathlib import Path

from efftrain.config import from_json
from efftrain.errors import ConfigError, RunError
from efftrain.models.config import ModelConfig
from efftrain.models.quantization import Quantization
from efftrain.recipe import MODEL_OF
from efftrain.train.run.directory import read_json

OUT = "out"
LENGTH, PEAK_LR, MAX_LENGTH = "training.length", "training.optimizer.peak-lr", "model.max-length"
FOR_THE_RUN = ("dtype", "scan", "remat", "layer_dropout")  # how a model is computed and trained, not what it computes


def with_own_settings(theirs: ModelConfig, mine: ModelConfig) -> ModelConfig:
    """Returns the model of another run as a configuration trains it.

    Args:
      theirs: configuration of the other run's model.
      mine: model of the configuration. Its dtype, scan, remat and layer dropout are kept, and its quantisation, if it
        has one.
    """
    kept = {name: getattr(mine, name) for name in FOR_THE_RUN}
    if mine.quantization != Quantization():
        kept["quantization"] = mine.quantization
    return theirs.replace(**kept)


def run_of_model(flags: Mapping[str, str], starts: tuple[str, ...]) -> Path | None:
    """Returns the run whose model a command line asks for.

    Args:
      flags: values of the flags by their names, such as "training.finetune".
      starts: names of the flags whose run the training starts from; ``--model-of`` goes before them.
    """
    named = (flags[name] for name in (MODEL_OF, *starts) if flags.get(name, "None") != "None")
    return next(map(Path, named), None)


def read_model(run: Path, script: types.ModuleType, *, flag: str) -> ModelConfig:
    """Reads the model configuration of a run.

    Args:
      run: the run directory.
      script: the recipe, in which classes that a recipe defined are looked up.
      flag: the flag that names the run, for the message.

    Raises:
      RunError: there is no such run.
      ConfigError: the script does not have a class of the model.
    """
    if not (run / "config.json").exists():
        raise RunError(f"{flag}: {run} holds no run; train or import it first, or give another one")
    model = from_json(read_json(run / "config.json").get("model"), script=script)
    if not isinstance(model, ModelConfig):
        raise RunError(f"{flag}: {run / 'config.json'} has no field 'model' that is a ModelConfig")
    return model


def known_length(run: Path, flags: Mapping[str, str]) -> int | None:
    """Returns the row length with which to train from a run that was imported; None: that of the configuration.

    Args:
      run: the run from which the training starts.
      flags: see ``run_of_model``.

    Raises:
      ConfigError: the run does not know a length or a learning rate, because it was imported, and no flag gives it.
    """
    before = read_json(run / "config.json").get("training") or {}
    if "optimizer" in before:  # it was trained here, so that the new learning rate is shown beside the old one
        return None
    needed = {LENGTH: before.get("length"), PEAK_LR: None}
    if missing := [name for name, value in needed.items() if value is None and name not in flags]:
        examples = {LENGTH: 1024, PEAK_LR: 1e-5}
        raise ConfigError(
            f"the configuration of {run} names no {' and no '.join(missing)}, because its model was imported; give "
            f"them, such as {' '.join(f'--{name} {examples[name]}' for name in missing)}"
        )
    return before.get("length")
