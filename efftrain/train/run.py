"""The run directory: the unit of work, from which everything that was done can be loaded and continued."""

import contextlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from efftrain.config import difference, finite_json, from_json, to_json
from efftrain.errors import ConfigError, RunError
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.recipe import import_script
from efftrain.sharding import hosts
from efftrain.train.run_identity import FILE_NAME, PACKAGES, check_identity, process_code, run_identity, steps_made

# Fields that say how a run is carried out and not what it computes: they may change when it continues.
OPERATIONAL = (
    *("mesh", "eval_every", "profile", "watchdog", "out"),
    *("checkpoint_every", "keep_checkpoints", "keep_every", "checkpoints"),
)


class Run:
    """A directory with ``config.json``, ``environment.json``, ``recipe.py``, ``metrics.jsonl``, ``checkpoints/``, ...

    ``identity.json`` says which code and inputs the run was made by. An unfinished run continues with other code, as a
    mistake may have been mended: a warning names what has changed, and ``recipe.py`` is then the new script. A finished
    run of other code is refused, as it would be taken for what this code trains. Several processes are one run: the
    first of them writes.

    Args:
      path: of the directory.
      config: a dataclass.
      script: kept as ``recipe.py``: it has the classes that the configuration names and efftrain has not. None: the one
        that is running.
      inputs: digests of what the run is made from, by name (``inputs.input_contents``). Names that the directory does
        not know, or that are not given any more, are not compared.

    Attributes:
      checkpoints: the folder of the checkpoints: in the directory, or where the configuration says.

    Raises:
      RunError: the directory holds a run of another configuration or of other inputs, a finished one of other code, or
        something that is not a run; the processes differ in configuration, code or packages.
    """

    def __init__(
        self, path: Path | str, config: Any, *, script: Path | None = None, inputs: Mapping[str, str] | None = None
    ):
        self.path, self.config = Path(path), to_json(config)
        self._script = script or getattr(sys.modules["__main__"], "__file__", None)
        self._identity = run_identity(config, inputs or {}, alone=script is not None)
        self.checkpoints = checkpoint_directory(self.path, self.config)
        hosts.agree({"configuration": self.config} | process_code())
        with hosts.together():
            if hosts.process_index() == 0:
                self._make()

    def _make(self) -> None:
        if (self.path / "config.json").exists():
            self._check_same_config()
            self._check_same_identity()
        elif self.path.is_dir() and any(p.suffix != ".incomplete" for p in self.path.iterdir()):
            raise RunError(
                f"{self.path} is not empty and holds no config.json, so it is not a run; choose another --out"
            )
        with _writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_json("config.json", self.config)  # first: it makes the directory a run, if killed now
            if (self.path / FILE_NAME).exists() and steps_made(self.path, self.checkpoints, self.config) == "all":
                return  # what it was trained by stays written there
            self.write_json("environment.json", environment())
            self._copy_recipe()
            self.write_json(FILE_NAME, self._identity)

    def _check_same_config(self) -> None:
        before = read_json(self.path / "config.json")
        with contextlib.suppress(ConfigError):  # fields that did not exist then have their defaults
            before = to_json(from_json(before, script=sys.modules["__main__"]))
        lines = difference(_without_operational(before), _without_operational(self.config))
        if lines:
            more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
            raise RunError(
                f"{self.path} holds a run with another configuration ({lines[0]}{more}); choose another --out, or give "
                "the same configuration to continue it"
            )

    def _check_same_identity(self) -> None:
        path = self.path / FILE_NAME
        before = read_json(path) if path.exists() else None
        check_identity(self.path, before, self._identity, steps=steps_made(self.path, self.checkpoints, self.config))
        self._identity["inputs"] = (before["inputs"] if before else {}) | self._identity["inputs"]

    def _copy_recipe(self) -> None:
        script, copy = self._script and Path(self._script), self.path / "recipe.py"
        if script and script.suffix == ".py" and script.exists() and not (copy.exists() and copy.samefile(script)):
            shutil.copyfile(script, copy)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a file of the run, whole or not at all."""
        temporary = self.path / f".{name}.incomplete"
        temporary.write_text(json.dumps(finite_json(value), indent=2, allow_nan=False) + "\n")
        os.replace(temporary, self.path / name)


class MetricsLog:
    """``metrics.jsonl`` and TensorBoard events: one row a step, in order, also after a restart."""

    def __init__(self, directory: Path, *, after_step: int):
        """Rows of steps behind ``after_step`` (the one restored) are taken back: they will be written again."""
        self._path = directory / "metrics.jsonl"
        with _writing(directory):
            if self._path.exists():
                rows = [row for row in _complete_rows(self._path) if row["step"] <= after_step]
                temporary = self._path.with_suffix(".incomplete")
                temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
                os.replace(temporary, self._path)
            self._file = self._path.open("a", buffering=1)
            self._events = Events(directory / "tensorboard", after_step=after_step)

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        split: str = "train",
        arrays: Mapping[str, list] | None = None,
    ) -> None:
        """A figure that is not finite becomes null: JSON has no word for it. Arrays stay out of TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _writing(self._path):
            self._file.write(json.dumps({"step": step, "split": split, **finite, **finite_json(arrays or {})}) + "\n")
            self._events.write(step, {f"{split}/{name}": value for name, value in values.items()})

    def flush(self) -> None:
        """What was written survives the process from here on."""
        with _writing(self._path):
            self._events.flush()

    def close(self) -> None:
        with _writing(self._path):
            self._file.close()
            self._events.close()


class Events:
    """A TensorBoard event file. Written in this thread: the thread of ``SummaryWriter`` hangs when the disk is full."""

    def __init__(self, directory: Path, *, after_step: int):
        """TensorBoard drops what earlier files say of steps behind ``after_step``."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory.mkdir(exist_ok=True)
        self._proto, self._writer = event_pb2, EventsWriter(str(directory / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=after_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(self._proto.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(directory: Path | str, split: str = "train") -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` of one split."""
    return [row for row in _complete_rows(Path(directory) / "metrics.jsonl") if row["split"] == split]


def _complete_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the process was killed while it wrote the last line
    return rows


def checkpoint_directory(run: Path, config: Any) -> Any:
    """Where a run of this configuration (JSON) has its checkpoints: a ``Path``, or an ``epath.Path`` for a URL."""
    training = config.get("training") if isinstance(config, dict) else None
    place = training.get("checkpoints") if isinstance(training, dict) else None
    if place is None:
        return run / "checkpoints"
    if "://" not in place:
        return Path(place)
    from etils import epath

    return epath.Path(place)


def load(directory: Path | str, *, finite: bool = True) -> Decoder:
    """The trained model of a run directory, with averaged parameters where the run keeps them.

    Args:
      directory: of the run.
      finite: refuse a model that holds NaN or infinity. False: return it, to see where it went wrong.

    Raises:
      RunError: the directory holds no run or no complete checkpoint, or the model holds numbers that are not finite.
    """
    directory = Path(directory)
    model_config = load_model_config(directory)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(model_config, rngs=nnx.Rngs(0))))
    place = checkpoint_directory(directory, read_json(directory / "config.json"))
    return nnx.merge(graph, load_variables(place, _on_one_device(abstract), finite=finite))


def load_variables(checkpoints: Any, abstract: nnx.State, *, finite: bool = True) -> nnx.State:
    """As ``load``: the model's variables in the newest of these checkpoints, in the shardings of ``abstract``."""
    from efftrain.train.checkpoints import Checkpoints

    with Checkpoints(checkpoints, read_only=True) as opened:
        return opened.restore_model(abstract, finite=finite)


def check_model(directory: Path) -> None:
    """Reads the model of a run, array by array, so that what ``load`` refuses is refused before something is written.

    Raises:
      RunError: as for ``load``.
    """
    from efftrain.train.checkpoints import Checkpoints

    model_config, settings = load_model_config(directory), read_json(directory / "config.json")
    abstract = nnx.state(nnx.eval_shape(lambda: Decoder(model_config, rngs=nnx.Rngs(0))))
    with Checkpoints(checkpoint_directory(directory, settings), read_only=True) as opened:
        for _ in opened.model_arrays(_on_one_device(abstract)):
            pass


def _on_one_device(abstract: nnx.State) -> nnx.State:
    here = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)


def find_tokenizer(directory: Path) -> Path | None:
    """The tokenizer of a run: its own, or (of a run of an earlier version) that of the corpus that it names."""
    corpus = read_json(directory / "config.json").get("corpus") or directory
    places = (Path(folder) / "tokenizer.json" for folder in (directory, corpus))
    return next((place for place in places if place.exists()), None)


def newest_step(directory: Path, settings: Any) -> int:
    """Of a run's checkpoints; ``settings``: what its ``config.json`` holds.

    Raises:
      RunError: there is none.
    """
    from efftrain.train.checkpoints import Checkpoints

    with Checkpoints(checkpoint_directory(directory, settings), read_only=True) as checkpoints:
        steps = checkpoints.steps()
    if not steps:
        raise RunError(f"{directory} holds no checkpoint; train it first")
    return steps[-1]


def load_model_config(directory: Path | str) -> ModelConfig:
    """The ``model`` of a run's configuration; classes that its recipe defined come from the run's own ``recipe.py``."""
    directory = Path(directory)
    if not (directory / "config.json").exists():
        raise RunError(f"{directory} holds no config.json, so it is not a run; give the --out of a training run")
    return model_config(directory, read_json(directory / "config.json"))


def model_config(directory: Path, settings: Any) -> ModelConfig:
    """As ``load_model_config``, of what ``config.json`` holds."""
    value = settings.get("model")
    script = import_script(directory / "recipe.py") if ".py:" in json.dumps(value) else None
    config = from_json(value, script=script)
    if not isinstance(config, ModelConfig):
        raise RunError(
            f"{directory / 'config.json'} has no field 'model' that is a ModelConfig; was it a training run?"
        )
    return config


def environment() -> dict[str, Any]:
    """What a figure depends on beside the configuration: versions, devices, commit."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.orig_argv[1:],
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_cores": os.cpu_count(),
        "processes": jax.process_count(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "packages": {name: version(name) for name in PACKAGES},
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+changes`` where files differ from it.

    None for an installed package, also where its environment stands in a checkout of something else.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("ls-files", "--error-unmatch", __file__) and git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain") else "")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if (info.exists())
        else []
    )
    return names[0] if names else platform.processor()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"cannot write to {path} ({error.strerror or error}); choose another --out, or free the disk and give the "
            "same command again"
        ) from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it or choose another --out") from error


def _without_operational(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_operational(v) for k, v in value.items() if k not in OPERATIONAL}
    return [_without_operational(v) for v in value] if isinstance(value, list) else value
