"""A build in stages of independent items. What an item leaves on disk is all that later stages know of it.

An item is done when its summary is there, which is written last and renamed into place. A build that is run again goes
on with the items that are not done; in which process, on which machine and in which order items ran changes nothing.
"""

import functools
import json
import os
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from efftrain.progress import Progress


class Task(Protocol):
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
    task: Task

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def load(folder: Path) -> "Stage":
        """The stage as ``run_stage`` saved it, for a worker."""
        with (folder / "task.pickle").open("rb") as stream:
            return Stage(folder.name, folder, pickle.load(stream))

    def run_item(self, number: int) -> None:
        summary = self.task(number, self.folder)
        write_json(self.folder / f"{stem(number)}.json", summary)

    def summary(self, number: int) -> dict[str, Any] | None:
        path = self.folder / f"{stem(number)}.json"
        return read_json(path) if path.exists() else None


def run_stage(engine: Engine, work: Path, name: str, task: Task, n_items: int, title: str) -> list[dict[str, Any]]:
    """Does the items that are not done yet.

    Returns:
      The summaries of all items, in the order of their numbers.
    """
    stage = Stage(name, work / name, task)
    stage.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(n_items) if stage.summary(number) is None]
    if missing:
        (stage.folder / "task.pickle").write_bytes(pickle.dumps(task))
        Stage.load.cache_clear()
        with Progress(title, n_items, unit="parts", initial=n_items - len(missing)) as progress:
            for _ in engine.run(stage, missing):
                progress.advance(1)
    return [stage.summary(number) for number in range(n_items)]


def stem(number: int) -> str:
    return f"{number:06d}"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """The file is whole or not there."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)
