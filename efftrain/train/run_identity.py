"""Which code and inputs a run was made by, and what becomes of it when these have changed."""

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from efftrain.code_identity import changed_code, code_identity, defined_outside, package_identity
from efftrain.config import digest
from efftrain.errors import ConfigError, RunError
from efftrain.progress import console

FILE_NAME = "identity.json"
FIGURES = "training.json"  # written when a run is finished
ROOMS = ("data", "models", "ops", "sharding", "train")  # take part in every run; an objective may bring others

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "efftrain")

Steps = Literal["none", "some", "all"]  # of a run, those that it has made


def run_identity(config: Any, inputs: Mapping[str, str], *, alone: bool) -> dict[str, dict[str, str]]:
    """What ``identity.json`` holds.

    Args:
      config: of the run; the modules that define its parts count.
      inputs: digests by name.
      alone: the running script does not count; otherwise it does, with what it imports.
    """
    main = sys.modules["__main__"]
    values = (config,) if alone or not defined_outside(main) else (config, main)
    try:
        code = code_identity(*values, rooms=ROOMS)
    except ConfigError:  # a notebook keeps no source of its cells, and must be able to train
        code = {"efftrain": package_identity(ROOMS)}
    return {"code": code, "inputs": dict(inputs)}


def check_identity(run: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], *, steps: Steps) -> None:
    """Refuses a run of other inputs and a finished one of other code; warns of an unfinished one of other code.

    Args:
      run: the directory, for messages.
      before: what its ``identity.json`` holds; None where an earlier version has left none.
      now: of the command that is given.
      steps: see ``steps_made``.

    Raises:
      RunError: see above.
    """
    before = before or {"code": None, "inputs": {}}
    for name, value in now["inputs"].items():
        if before["inputs"].get(name, value) != value:
            raise RunError(
                f"{run} holds a run that was made from something else: what {name} names has changed; choose another "
                "--out, or restore it to continue"
            )
    changed = changed_code(before["code"], now["code"])
    if changed and steps == "all":
        raise RunError(
            f"{run} was trained by other code (changed since: {changed}); choose another --out, or delete it to train "
            "again"
        )
    if changed and steps == "some":
        console.print(
            f"warning: {run} was begun by other code and continues with this one (changed since: {changed})",
            style="yellow",
            markup=False,
        )


def steps_made(run: Path, checkpoints: Any, config: Any) -> Steps:
    """How far a run has come, by its checkpoints; ``config`` as its ``config.json`` holds it."""
    from etils import epath

    if (run / FIGURES).exists():  # also of a finished run whose checkpoints were deleted
        return "all"
    places, training = epath.Path(checkpoints), config.get("training")
    steps = {place.name for place in places.iterdir() if place.name.isdigit()} if places.exists() else set()
    last = str(training.get("steps")) if isinstance(training, dict) else None
    return "all" if last in steps else "some" if steps else "none"


def process_code() -> dict[str, Any]:
    """What must be the same on all processes beside the configuration. Sources, as a commit does not know of edits."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "code": package_identity(),
        "recipe": digest(Path(script).read_bytes().hex()) if script and Path(script).is_file() else None,
    }
