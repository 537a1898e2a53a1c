"""The run directory: the unit of work, from which a model can be loaded and a run continued."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from efftrain.config import difference, finite_json, from_json, to_json
from efftrain.errors import ConfigError, RunError
from efftrain.lock import FILE_NAME as LOCK
from efftrain.lock import Lock
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.progress import console
from efftrain.recipe import import_script
from efftrain.sharding import hosts
from efftrain.train.run.environment import environment
from efftrain.train.run.identity import (
    FILE_NAME,
    check_identity,
    earlier_history,
    keep_sources,
    process_code,
    run_identity,
    run_sources,
    steps_made,
    with_entry,
)
from efftrain.train.run.writing import writing

# Fields that say how a run is carried out, not what it computes: they may change when it continues.
OPERATIONAL = (
    *("mesh", "eval_every", "profile", "watchdog", "out"),
    *("checkpoint_every", "keep_checkpoints", "keep_every", "checkpoints"),
)


class Run:
    """A directory with ``config.json``, ``environment.json``, ``recipe.py``, ``metrics.jsonl``, ``checkpoints/``, ...

    ``identity.json`` records the code and the inputs that made the run. An unfinished run may continue with other code,
    because a mistake may have been fixed: a warning names what has changed, and ``recipe.py`` is then the new script.
    Every script that trained the run stays in ``code/``, with the user's own modules that it imports, and the
    ``history`` in ``identity.json`` says which of them made which steps. A finished run of other code raises an error,
    because it would be mistaken for what the present code trains. A directory whose run ended before its first step
    holds nothing that could be lost, so that a run with another configuration may replace it.

    Several processes are one run: the first of them writes, and locks the directory against every other command until
    ``close``, or until this object or the process ends. Reading (``load``) needs no lock.

    Args:
      path: path of the directory.
      config: configuration of the run, a dataclass.
      script: file that is copied to ``recipe.py``; it defines the classes that the configuration names and that are not
        in efftrain. None: the running script.
      inputs: digests of the inputs of the run, by name (``inputs.input_contents``). Names that the directory does not
        have, or that are not given any more, are not compared.

    Attributes:
      checkpoints: folder of the checkpoints: in the directory, or where the configuration says.

    Raises:
      InUseError: another command is training the run.
      RunError: the directory holds a run of another configuration or of other inputs, a finished run of other code, or
        something that is not a run; or the processes differ in configuration, code or packages.
    """

    def __init__(
        self, path: Path | str, config: Any, *, script: Path | None = None, inputs: Mapping[str, str] | None = None
    ):
        self.path, self.config = Path(path), to_json(config)
        self._script = script or getattr(sys.modules["__main__"], "__file__", None)
        self._identity: dict[str, Any] = run_identity(config, inputs or {}, alone=script is not None)
        self._sources = run_sources(config, alone=script is not None)
        self.checkpoints = checkpoint_directory(self.path, self.config)
        hosts.agree({"configuration": self.config} | process_code())
        self._lock: Lock | None = None
        with hosts.together():
            if hosts.process_index() == 0:
                try:
                    self._make()
                except BaseException:
                    self.close()
                    raise

    def close(self) -> None:
        """Unlocks the directory, so that other processes can continue the run; the end of this object does the same."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make(self) -> None:
        made = (self.path / "config.json").exists()
        if not made and self.path.is_dir() and not all(map(_is_ours, self.path.iterdir())):
            raise RunError(
                f"{self.path} is not empty and holds no config.json, so it is not a run; choose another --out"
            )
        with writing(self.path):
            self._lock = Lock(self.path / LOCK, self.path)
        begun = has_begun(self.path)
        if begun:
            self._check_same_config()
            self._check_same_identity()
        elif made and read_json(self.path / "config.json") != self.config:
            console.print(f"{self.path} holds a run that has made no step; the new run replaces it", markup=False)
        with writing(self.path):
            self.write_json("config.json", self.config)  # first: if killed now, the directory is already a run
            before = self._identity_before()
            steps = steps_made(self.path, self.checkpoints, self.config) if begun else "none"
            self._identity["history"] = earlier_history(self.path, before, steps=steps)
            if before and steps == "all":
                return  # the directory keeps the environment and code that trained it
            self.write_json("environment.json", environment())
            self._copy_recipe()
            self.write_json(FILE_NAME, self._identity)

    def begin(self, step: int) -> None:
        """Records that the code of this process makes the steps from ``step`` on, and keeps its sources."""
        if hosts.process_index() == 0:
            with writing(self.path):
                sources = keep_sources(self.path, self._sources)
                entry = {"first_step": step, "code": self._identity["code"], "sources": sources}
                self._identity["history"] = with_entry(self._identity["history"], entry)
                self.write_json(FILE_NAME, self._identity)

    def _check_same_config(self) -> None:
        before = read_json(self.path / "config.json")
        with contextlib.suppress(ConfigError):  # fields that did not exist when it was written get their defaults
            before = to_json(from_json(before, script=sys.modules["__main__"]))
        lines = difference(_without_operational(before), _without_operational(self.config))
        if lines:
            more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise RunError(
                f"{self.path} holds a run with another configuration ({lines[0]}{more}); choose another --out, where "
                "--training.resume-from or --training.finetune go on from this run, or give the same configuration to "
                "continue it"
            )
        place = checkpoint_directory(self.path, before)
        moved = place != self.checkpoints and steps_made(self.path, place, before) != "none"
        if moved and steps_made(self.path, self.checkpoints, self.config) == "none":
            raise RunError(
                f"{self.checkpoints} has no checkpoint, and the run {self.path} keeps its checkpoints in {place}; move "
                "them there, or give training.checkpoints as it was"
            )

    def _identity_before(self) -> dict[str, Any] | None:
        path = self.path / FILE_NAME
        return read_json(path) if path.exists() else None

    def _check_same_identity(self) -> None:
        before = self._identity_before()
        check_identity(self.path, before, self._identity, steps=steps_made(self.path, self.checkpoints, self.config))
        self._identity["inputs"] = (before["inputs"] if before else {}) | self._identity["inputs"]

    def _copy_recipe(self) -> None:
        script, copy = self._script and Path(self._script), self.path / "recipe.py"
        if script and script.suffix == ".py" and script.exists() and not (copy.exists() and copy.samefile(script)):
            shutil.copyfile(script, copy)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the run as JSON, either completely or not at all."""
        temporary = self.path / f".{name}.incomplete"
        temporary.write_text(json.dumps(finite_json(value), indent=2, allow_nan=False) + "\n")
        os.replace(temporary, self.path / name)


def checkpoint_directory(run: Path, config: Any) -> Any:
    """Returns the folder of a run's checkpoints: a ``Path``, or an ``epath.Path`` for a URL.

    Args:
      run: the run directory.
      config: its configuration as JSON.
    """
    training = config.get("training") if isinstance(config, dict) else None
    place = training.get("checkpoints") if isinstance(training, dict) else None
    if place is None:
        return run / "checkpoints"
    if "://" not in place:
        return Path(place)
    from etils import epath

    return epath.Path(place)


def has_begun(directory: Path) -> bool:
    """Returns whether the directory holds a run that made a step: it has a checkpoint, figures or a row of metrics."""
    if not (directory / "config.json").exists():
        return False
    settings = read_json(directory / "config.json")
    steps = steps_made(directory, checkpoint_directory(directory, settings), settings)
    return steps != "none" or ((rows := directory / "metrics.jsonl").exists() and rows.stat().st_size > 0)


def load(directory: Path | str, *, finite: bool = True) -> Decoder:
    """Loads the trained model of a run directory, with averaged parameters if the run keeps them.

    Args:
      directory: the run directory.
      finite: raise an error if the model holds NaN or infinity. False: return it anyway, to find out where it failed.

    Raises:
      RunError: the directory holds no run or no complete checkpoint, or the model holds numbers that are not finite.
    """
    directory = Path(directory)
    model_config = load_model_config(directory)
    graph, abstract = nnx.split(abstract_decoder(model_config))
    place = checkpoint_directory(directory, read_json(directory / "config.json"))
    return nnx.merge(graph, load_variables(place, _on_one_device(abstract), finite=finite))


def load_variables(checkpoints: Any, abstract: nnx.State, *, finite: bool = True) -> nnx.State:
    """As ``load``: the model's variables from the newest of these checkpoints, in the shardings of ``abstract``."""
    from efftrain.train.checkpoints.checkpoints import Checkpoints

    with Checkpoints(checkpoints, read_only=True) as opened:
        return opened.restore_model(abstract, finite=finite)


def check_model(directory: Path) -> None:
    """Reads the model of a run, array by array, so that ``load`` would fail before a command writes anything.

    Raises:
      RunError: as for ``load``.
    """
    from efftrain.train.checkpoints.checkpoints import Checkpoints

    model_config, settings = load_model_config(directory), read_json(directory / "config.json")
    abstract = nnx.state(abstract_decoder(model_config))
    with Checkpoints(checkpoint_directory(directory, settings), read_only=True) as opened:
        for _ in opened.model_arrays(_on_one_device(abstract)):
            pass


def _on_one_device(abstract: nnx.State) -> nnx.State:
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


def newest_step(directory: Path, settings: Any) -> int:
    """Returns the step of a run's newest checkpoint.

    Args:
      directory: the run directory.
      settings: content of its ``config.json``.

    Raises:
      RunError: there is no checkpoint.
    """
    from efftrain.train.checkpoints.checkpoints import Checkpoints

    with Checkpoints(checkpoint_directory(directory, settings), read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise RunError(f"{directory} holds no checkpoint; train it first")
    return steps[-1]


def load_model_config(directory: Path | str) -> ModelConfig:
    """Loads the model configuration of a run; classes that its recipe defined come from the run's ``recipe.py``."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise RunError(f"{directory} holds no config.json, so it is not a run; give the --out of a training run")
    return model_config(directory, read_json(directory / "config.json"))


def model_config(directory: Path, settings: Any) -> ModelConfig:
    """As ``load_model_config``, from the content of ``config.json``."""
    value = settings.get("model")
    script = import_script(directory / "recipe.py") if ".py:" in json.dumps(value) else None
    config = from_json(value, script=script)
    if not isinstance(config, ModelConfig):
        raise RunError(
            f"{directory / 'config.json'} has no field 'model' that is a ModelConfig; was it a training run?"
        )
    return config


def row_length(run: Path, settings: Mapping[str, Any], asked: int | None = None) -> int:
    """Returns the number of tokens of the rows that a command reads from a corpus.

    Args:
      run: the run directory, for the message.
      settings: content of its ``config.json``.
      asked: the length that the command was given. None: as the run's model was trained.

    Raises:
      ConfigError: neither says so, because the model was imported, or the rows are longer than the model's.
    """
    if asked is not None:
        if not 1 < asked <= (longest := settings["model"]["max_length"]):
            raise ConfigError(f"--length is {asked}; use 2 to {longest}, model.max_length of {run}")
        return asked
    length = settings.get("training", {}).get("length")
    if length is None:
        raise ConfigError(
            f"the configuration of {run} names no training.length, because its model was imported; give --length, the "
            "number of tokens of the rows that are read from the corpus, such as 1024"
        )
    return length


def _is_ours(path: Path) -> bool:
    """Whether a process left this file when it was killed before the directory was a run."""
    return path.suffix == ".incomplete" or path.name == LOCK


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it or choose another --out") from error


def _without_operational(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_operational(v) for k, v in value.items() if k not in OPERATIONAL}
    return [_without_operational(v) for v in value] if isinstance(value, list) else value
