"""Runs the stages of a build, each consisting of independent items whose results are files.

An item is done when its summary exists, which is written last and renamed into place. A resumed build runs only the
items that are not done. The result does not depend on the process, the machine or the order in which items run.
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
    """The interface of the work of a stage: a frozen dataclass that can be pickled."""

    def __call__(self, number: int, folder: Path) -> dict[str, Any]:
        """Processes item ``number`` and returns a summary of JSON values.

        The files that it writes to ``folder`` have names that begin with ``stem(number)``.
        """
        ...


class Engine(Protocol):
    """The interface of an engine, which runs items. All workers must have access to the folder of the corpus.

    Attributes:
      budget: memory in bytes that the workers of a machine may use together.
      n_workers: number of workers that share the budget.
    """

    @property
    def budget(self) -> int: ...

    @property
    def n_workers(self) -> int: ...

    def run(self, stage: "Stage", numbers: Sequence[int]) -> Iterator[int]:
        """Runs the items and yields the number of each when it is done."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Stage:
    """A named task with the folder of its results."""

    name: str
    folder: Path
    task: StageTask

    def save(self) -> None:
        """Writes the task for workers in other processes, with the scripts that define its rules and sources."""
        try:
            task = pickle.dumps(self.task)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"a rule or source of this corpus cannot be pickled for a worker ({error}); define its class at the "
                "top level of a module or script, and keep open files and functions out of its fields"
            ) from error
        strings = {value for _, value, _ in pickletools.genops(task) if isinstance(value, str)}
        scripts = {
            module.__name__: (file, file_digest(Path(file)))
            for module in modules_outside(sorted(name for name in strings if name.startswith(SCRIPT_PREFIX)))
            if module.__name__.startswith(SCRIPT_PREFIX) and (file := module.__file__)
        }
        _imported.update({name: digest for name, (_, digest) in scripts.items()})
        (self.folder / "task.pickle").write_bytes(pickle.dumps((scripts, task)))

    @staticmethod
    def load(folder: Path) -> "Stage":
        """Loads the stage that ``save`` wrote.

        A cached stage is reused only if the file is unchanged: a worker outlives a stage, and successive builds use the
        same folder.
        """
        status = (folder / "task.pickle").stat()
        return _load(folder, status.st_mtime_ns, status.st_ino)

    def run_item(self, number: int) -> None:
        summary = self.task(number, self.folder)
        write_summary(self.folder / f"{stem(number)}.json", summary)

    def summary(self, number: int) -> dict[str, Any] | None:
        return read_summary(self.folder / f"{stem(number)}.json")


def run_stage(engine: Engine, work: Path, name: str, task: StageTask, n_items: int, title: str) -> list[dict[str, Any]]:
    """Runs the items of a stage that are not done yet.

    Args:
      engine: runs the items.
      work: the folder of intermediate files; results are written to its subfolder ``name``.
      name: name of the stage.
      task: the work of the stage.
      n_items: number of items.
      title: the text of the progress display.

    Returns:
      The summaries of all items, in the order of their numbers.

    Raises:
      CorpusError: the engine has left out an item.
    """
    stage = Stage(name, work / name, task)
    stage.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(n_items) if stage.summary(number) is None]
    if missing:
        stage.save()
        with Progress(title, n_items, unit="parts", initial=n_items - len(missing)) as progress:
            for _ in engine.run(stage, missing):
                progress.advance(1)
    summaries = [stage.summary(number) for number in range(n_items)]
    done = [summary for summary in summaries if summary is not None]
    if len(done) < n_items:
        raise CorpusError(
            f"{stage.folder}: the engine ended, and {n_items - len(done)} of {n_items} parts have no summary; run the "
            "same command again"
        )
    return done


def stem(number: int) -> str:
    return f"{number:06d}"


def read_summary(path: Path) -> dict[str, Any] | None:
    """Returns the summary of an item; None if it is missing or damaged, so that the item is run (again)."""
    try:
        return json.loads(path.read_bytes().decode())
    except (FileNotFoundError, ValueError):
        return None


def write_summary(path: Path, value: Any) -> None:
    """Writes a summary atomically."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


@functools.lru_cache(maxsize=1)
def _load(folder: Path, modified_ns: int, inode: int) -> Stage:
    """Loads a stage; the two numbers distinguish tasks that were saved in the same folder one after the other."""
    scripts, task = pickle.loads((folder / "task.pickle").read_bytes())
    for name, (path, digest) in scripts.items():
        _import(name, Path(path), digest)
    return Stage(folder.name, folder, pickle.loads(task))


def _import(name: str, path: Path, digest: str) -> None:
    """Imports a script, so that its classes can be unpickled; imports it again if it has changed since."""
    if file_digest(path) != digest:
        raise CorpusError(f"{path} was changed while the corpus was built; run the same command again")
    if name not in sys.modules or _imported.get(name, digest) != digest:
        import_script(path, name)
    _imported[name] = digest


_imported: dict[str, str] = {}  # module -> digest, for the scripts that define the tasks in this process
