"""A build in stages of independent items. What an item leaves on disk is all that later stages know of it.

An item is done when its summary is there, which is written last and renamed into place. A build that is run again goes
on with the items that are not done; in which process, on which machine and in which order items ran changes nothing.
"""

import functools
import json
import os
import pickle
import pickletools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from efftrain.class_names import SCRIPT_PREFIX
from efftrain.code_identity import modules_outside
from efftrain.data.storage.shards import file_digest
from efftrain.errors import ConfigError, CorpusError
from efftrain.progress import Progress
from efftrain.recipe import import_script


class StageTask(Protocol):
    """A frozen dataclass that can be pickled."""

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        """Does item ``number``, writes files whose names begin with ``stem(number)`` into the folder, and returns
        a summary of JSON values."""


class Engine(Protocol):
    """Runs items somewhere. All workers must see the folder of the corpus."""

    budget: int
    n_workers: int

    def run(self, stage: "Stage", numbers: Sequence[int]) -> Iterator[int]:
        """Yields the number of each item when it is done."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A task and the folder of its results."""

    name: str
    folder: Path
    task: StageTask

    def save(self) -> None:
        """Writes the task for workers in other processes, with the scripts that define its rules and sources."""
        try:
            task = pickle.dumps(self.task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"a rule or source of this corpus cannot be given to a worker ({error}); define its class at the top "
                "of a module or script, and keep open files and functions out of its fields"
            ) from error
        strings = {value for _, value, _ in pickletools.genops(task) if isinstance(value, str)}
        scripts = {
            module.__name__: (module.__file__, file_digest(Path(module.__file__)))
            for module in modules_outside(sorted(name for name in strings if name.startswith(SCRIPT_PREFIX)))
            if module.__name__.startswith(SCRIPT_PREFIX)
        }
        _imported.update({name: digest for name, (_, digest) in scripts.items()})
        (self.folder / "task.pickle").write_bytes(pickle.dumps((scripts, task)))

    @staticmethod
    def load(folder: Path) -> "Stage":
        """The stage as ``save`` left it. A worker outlives a stage, and a folder has the stages of several builds."""
        status = (folder / "task.pickle").stat()
        return _load(folder, status.st_mtime_ns, status.st_ino)

    def run_item(self, number: int) -> None:
        summary = self.task(number, self.folder)
        write_summary(self.folder / f"{stem(number)}.json", summary)

    def summary(self, number: int) -> dict[str, Any] | None:
        return read_summary(self.folder / f"{stem(number)}.json")


def run_stage(engine: Engine, work: Path, name: str, task: StageTask, n_items: int, title: str) -> list[dict[str, Any]]:
    """Does the items that are not done yet.

    Returns:
      The summaries of all items, in the order of their numbers.
    """
    stage = Stage(name, work / name, task)
    stage.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(n_items) if stage.summary(number) is None]
    if missing:
        stage.save()
        with Progress(title, n_items, unit="parts", initial=n_items - len(missing)) as progress:
            for _ in engine.run(stage, missing):
                progress.advance(1)
    return [stage.summary(number) for number in range(n_items)]


def stem(number: int) -> str:
    return f"{number:06d}"


def read_summary(path: Path) -> dict[str, Any] | None:
    """What an item left; None where it is not done, or its summary is damaged: it is then done again."""
    try:
        return json.loads(path.read_bytes().decode())
    except (FileNotFoundError, ValueError):
        return None


def write_summary(path: Path, value: Any) -> None:
    """The file is whole or not there."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


@functools.lru_cache(maxsize=1)
def _load(folder: Path, modified_ns: int, inode: int) -> Stage:
    """The two numbers tell the tasks apart that stood in one folder, one after the other."""
    scripts, task = pickle.loads((folder / "task.pickle").read_bytes())
    for name, (path, digest) in scripts.items():
        _import(name, Path(path), digest)
    return Stage(folder.name, folder, pickle.loads(task))


def _import(name: str, path: Path, digest: str) -> None:
    """Imports a script, so that what it defines can be unpickled; again where it has changed since."""
    if file_digest(path) != digest:
        raise CorpusError(f"{path} was changed while the corpus was built; run the same command again")
    if name not in sys.modules or _imported.get(name, digest) != digest:
        import_script(path, name)
    _imported[name] = digest


_imported: dict[str, str] = {}  # module -> digest of the scripts that tasks in this process were made of
