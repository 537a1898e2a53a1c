"""Digests of the inputs of a result by their content: a run or corpus rebuilt at the same path is another one."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from efftrain.code_identity import code_identity
from efftrain.config import digest, to_json
from efftrain.data.storage.shards import file_digest
from efftrain.data.storage.store import MANIFEST
from efftrain.models.decoder import Decoder
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.config import parse_resume_from
from efftrain.train.run.directory import checkpoint_directory, read_json

MODEL = ("params/", "ema/", "model_state/")  # the arrays of a checkpoint that belong to the model


def input_contents(config: Any) -> dict[str, str]:
    """Returns digests of everything that a configuration names by path: runs, corpora, teacher caches, files.

    Args:
      config: a dataclass. Its fields with a path count, except ``out``, and so do the runs that ``training`` names.

    Returns:
      Field name -> digest. Inputs that do not exist (any more) are left out, because a run may continue without the run
      from which it started.
    """
    paths = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "out"}
    found = {name: content(path) for name, path in paths.items() if isinstance(path, Path)}
    training = getattr(config, "training", None)
    if training is not None and (resume_from := getattr(training, "resume_from", None)):
        found["training.resume_from"] = content(*parse_resume_from(resume_from, training.steps))
    if finetune := getattr(training, "finetune", None):
        found["training.finetune"] = content(finetune)
    return {name: value for name, value in found.items() if value is not None}


def content(path: Path, step: int | None = None) -> str | None:
    """Returns the digest of a run's model, a corpus, a teacher cache or a file; None if there is none at the path.

    Args:
      path: a folder or a file.
      step: step of the run's checkpoint. None: the newest checkpoint.
    """
    if (path / MANIFEST).is_file():
        files = read_json(path / MANIFEST).get("files", {})
        # Only the files that training reads: the documents as text and the removed ones may be written in another way.
        read = {n: f for n, f in files.items() if not n.startswith("text/") and not n.endswith(".parquet")}
        return digest({name: file["blake2b"] for name, file in read.items()})
    if (path / "config.json").is_file():
        return _model_of(path, step)
    return file_digest(path) if path.is_file() else None


def model_digest(model: Decoder) -> str:
    """Returns a digest that identifies what a model computes, independent of where it is stored; 32 hex digits.

    It covers the model's configuration, the source of the script that defines parts of it, and the names, dtypes,
    shapes and bytes of all variables. The package's own code is not covered: a model of an earlier version is still the
    same model.
    """
    state = hashlib.blake2b(digest_size=16)
    state.update(digest({"config": to_json(model.config), "code": _own_code(model.config)}).encode())
    for name, leaf in sorted(flatten(nnx.state(model)).items()):
        array = np.asarray(leaf)
        state.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _own_code(config: Any) -> dict[str, str]:
    return {name: source for name, source in code_identity(config, rooms=("models",)).items() if name != "efftrain"}


def _model_of(run: Path, step: int | None) -> str | None:
    """As ``model_digest``, but from the fingerprints in the checkpoint, so that nothing large is read."""
    settings = read_json(run / "config.json")
    places = epath.Path(checkpoint_directory(run, settings))
    steps = [int(p.name) for p in places.iterdir() if p.name.isdigit()] if places.exists() else []
    if not steps or (step is not None and step not in steps):
        return None
    data = ocp.JsonCheckpointHandler().restore(places / str(max(steps) if step is None else step) / "data")
    arrays = {name: value for name, value in data["fingerprints"].items() if name.startswith(MODEL)}
    model, script = settings.get("model"), run / "recipe.py"
    own = file_digest(script) if ".py:" in json.dumps(model) and script.is_file() else None
    return digest({"model": model, "arrays": arrays, "recipe": own})
