"""The identity of a run: the code and inputs that made it, and the checks that they have not changed."""

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from efftrain.class_names import RENAMED_FIELDS
from efftrain.code_identity import changed_code, code_identity, defined_outside, own_sources, package_identity
from efftrain.config import digest
from efftrain.errors import ConfigError, RunError
from efftrain.progress import console

FILE_NAME = "identity.json"
SOURCES = "code"  # the folder of a run that keeps the sources of every recipe that trained it
FIGURES = "training.json"  # times of the run, written when it is finished
ROOMS = ("data", "models", "ops", "sharding", "train")  # packages that every run uses; an objective may add others

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "efftrain")

# Names of inputs in the files of earlier versions, which name the fields as they were called then.
_INPUTS = {f"training.{old}": f"training.{new}" for old, new in RENAMED_FIELDS["Training"].items()}

Completion = Literal["none", "some", "all"]  # how many of its steps a run has made


def run_identity(config: Any, inputs: Mapping[str, str], *, alone: bool) -> dict[str, dict[str, str]]:
    """Returns the content of ``identity.json``, without its history.

    Args:
      config: configuration of the run; the modules that define its parts count as code.
      inputs: digests by name.
      alone: only the configuration's modules count. False: the running script and what it imports count too.
    """
    try:
        code = code_identity(*_deciding(config, alone), rooms=ROOMS)
    except ConfigError:  # a notebook keeps no source of its cells, and must still be able to train
        code = {"efftrain": package_identity(ROOMS)}
    return {"code": code, "inputs": dict(inputs)}


def run_sources(config: Any, *, alone: bool) -> dict[str, bytes]:
    """Returns the user's own source files that make the run, by name; the arguments are those of ``run_identity``."""
    try:
        return own_sources(*_deciding(config, alone))
    except ConfigError:
        return {}


def keep_sources(run: Path, sources: Mapping[str, bytes]) -> str | None:
    """Writes source files into a folder of a run that is named by their content, so that they are never replaced.

    Returns:
      The folder, relative to the run, such as ``code/1f0c9a2b``. None: there are no files.
    """
    if not sources:
        return None
    state = hashlib.blake2b(digest_size=4)
    for name, content in sorted(sources.items()):
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    folder = run / SOURCES / state.hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in sources.items():
        (folder / name).write_bytes(content)
    return folder.relative_to(run).as_posix()


def earlier_history(run: Path, before: Mapping[str, Any] | None, *, steps: Completion) -> list[dict[str, Any]]:
    """Returns which code has made the steps of a run so far: the ``history`` of its ``identity.json``.

    Each entry has ``first_step``, ``code`` (digests) and ``sources`` (a folder of ``keep_sources``). A step was made by
    the last entry in the list whose ``first_step`` is not after it. A run of an earlier version has no history; its
    single entry then has the ``recipe.py`` of the run.

    Args:
      run: the run directory.
      before: content of its ``identity.json``. None: it has none.
      steps: see ``steps_made``.
    """
    if before is not None and "history" in before:
        return before["history"]
    recipe = run / "recipe.py"
    if steps != "some" or not recipe.exists():
        return []
    sources = keep_sources(run, {recipe.name: recipe.read_bytes()})
    return [{"first_step": 1, "code": before and before["code"], "sources": sources}]


def with_entry(history: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a history continued by an entry; entries that it replaces, because they start no earlier, stay before it.

    If the code is the same as that of the last entry, no entry is added; if the run went back to an older checkpoint,
    the last entry then begins there.
    """
    if not history or any(history[-1][name] != entry[name] for name in ("code", "sources")):
        return [*history, entry]
    *others, last = history
    return [*others, entry | {"first_step": min(last["first_step"], entry["first_step"])}]


def _deciding(config: Any, alone: bool) -> tuple[Any, ...]:
    main = sys.modules["__main__"]
    return (config,) if alone or not defined_outside(main) else (config, main)


def check_identity(run: Path, before: Mapping[str, Any] | None, now: Mapping[str, Any], *, steps: Completion) -> None:
    """Raises an error for a run of other inputs or a finished run of other code; warns of other code otherwise.

    Args:
      run: the run directory, for messages.
      before: content of its ``identity.json``. None: an earlier version has left none.
      now: identity of the present command.
      steps: see ``steps_made``.

    Raises:
      RunError: the inputs have changed, or the run is finished and the code has changed.
    """
    nothing: dict[str, Any] = {"code": None, "inputs": {}}
    before = before or nothing
    inputs = {_INPUTS.get(name, name): value for name, value in before["inputs"].items()}
    for name, value in now["inputs"].items():
        if inputs.get(name, value) != value:
            raise RunError(
                f"{run} holds a run with another input: the contents of {name} have changed; choose another --out, or "
                "restore them to continue"
            )
    changed = changed_code(before["code"], now["code"])
    if changed and steps == "all":
        raise RunError(
            f"{run} was trained with other code (changed since: {changed}); choose another --out, or delete it to "
            "train again"
        )
    if changed and steps == "some":
        console.print(
            f"warning: {run} was started with other code and continues with this code (changed since: {changed})",
            style="yellow",
            markup=False,
        )


def steps_made(run: Path, checkpoints: Any, config: Any) -> Completion:
    """Returns whether the checkpoints of a run show none, some or all of its steps.

    Args:
      run: the run directory.
      checkpoints: folder of its checkpoints.
      config: content of its ``config.json``.
    """
    from etils import epath

    if (run / FIGURES).exists():  # also in a finished run whose checkpoints were deleted
        return "all"
    places, training = epath.Path(checkpoints), config.get("training")
    steps = {place.name for place in places.iterdir() if place.name.isdigit()} if places.exists() else set()
    last = str(training.get("steps")) if isinstance(training, dict) else None
    return "all" if last in steps else "some" if steps else "none"


def process_code() -> dict[str, Any]:
    """Returns what must agree on all processes beside the configuration; sources, as a commit does not show edits."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "code": package_identity(),
        "recipe": digest(Path(script).read_bytes().hex()) if script and Path(script).is_file() else None,
    }
