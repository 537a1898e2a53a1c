"""Which code and inputs a run was made by, and what becomes of it when these have changed."""

import hashlib
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from efftrain.code_identity import changed_code, code_identity, defined_outside, own_sources, package_identity
from efftrain.config import digest
from efftrain.errors import ConfigError, RunError
from efftrain.progress import console

FILE_NAME = "identity.json"
SOURCES = "code"  # the folder of a run with the sources of every recipe that trained it
FIGURES = "training.json"  # written when a run is finished
ROOMS = ("data", "models", "ops", "sharding", "train")  # take part in every run; an objective may bring others

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "efftrain")

Steps = Literal["none", "some", "all"]  # of a run, those that it has made


def run_identity(config: Any, inputs: Mapping[str, str], *, alone: bool) -> dict[str, dict[str, str]]:
    """What ``identity.json`` holds, without its history.

    Args:
      config: of the run; the modules that define its parts count.
      inputs: digests by name.
      alone: the running script does not count; otherwise it does, with what it imports.
    """
    try:
        code = code_identity(*_deciding(config, alone), rooms=ROOMS)
    except ConfigError:  # a notebook keeps no source of its cells, and must be able to train
        code = {"efftrain": package_identity(ROOMS)}
    return {"code": code, "inputs": dict(inputs)}


def run_sources(config: Any, *, alone: bool) -> dict[str, bytes]:
    """The user's own source files that a run is made by, by name; arguments as for ``run_identity``."""
    try:
        return own_sources(*_deciding(config, alone))
    except ConfigError:
        return {}


def keep_sources(run: Path, sources: Mapping[str, bytes]) -> str | None:
    """Writes source files into a folder of a run that is named by their content, where nothing replaces them.

    Returns:
      The folder, relative to the run, such as ``code/1f0c9a2b``. None where there are no files.
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


def earlier_history(run: Path, before: Mapping[str, Any] | None, *, steps: Steps) -> list[dict[str, Any]]:
    """Which code has made the steps of a run so far: the ``history`` of its ``identity.json``.

    Each entry has ``first_step``, ``code`` (digests) and ``sources`` (a folder of ``keep_sources``). A step was made by
    the last entry of the list whose ``first_step`` is not after it. Of a run of an earlier version, which kept no
    history, the one entry has the ``recipe.py`` that is there.
    """
    if before is not None and "history" in before:
        return before["history"]
    recipe = run / "recipe.py"
    if steps != "some" or not recipe.exists():
        return []
    sources = keep_sources(run, {recipe.name: recipe.read_bytes()})
    return [{"first_step": 1, "code": before and before["code"], "sources": sources}]


def with_entry(history: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """A history that goes on with an entry; entries that it replaces, as they start no earlier, stay listed before it.

    The same code again is no new entry; where the run went back to an older checkpoint, it begins there.
    """
    *others, last = history or [None]
    if last is None or any(last[name] != entry[name] for name in ("code", "sources")):
        return [*history, entry]
    return [*others, entry | {"first_step": min(last["first_step"], entry["first_step"])}]


def _deciding(config: Any, alone: bool) -> tuple[Any, ...]:
    main = sys.modules["__main__"]
    return (config,) if alone or not defined_outside(main) else (config, main)


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
