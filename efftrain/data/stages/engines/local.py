"""Runs the items of a stage on the cores of this machine."""

import functools
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from pathlib import Path

from efftrain.data.stages.stage import Stage
from efftrain.errors import ConfigError, CorpusError

WORKER_BYTES = 1 << 30  # memory that a process may need, for a document of 64 MB with its words, rules and shingles


@dataclass(frozen=True, kw_only=True)
class Local:
    """An engine that runs items in processes of this machine.

    Processes are spawned, because a fork would copy locks of the tokenizer's threads.

    Attributes:
      processes: number of processes. None: one per core, as far as ``memory`` allows.
      memory: memory in bytes for all processes together. None: three quarters of the memory that is available at the
        start.
    """

    processes: int | None = None
    memory: int | None = None

    def __post_init__(self):
        if self.processes is not None and self.processes < 1:
            raise ConfigError(f"engine.processes is {self.processes}; it must be at least 1")
        if self.memory is not None and self.memory < WORKER_BYTES:
            raise ConfigError(f"engine.memory is {self.memory:,}; one process may need {WORKER_BYTES:,} bytes")

    @functools.cached_property
    def budget(self) -> int:
        import psutil

        return self.memory or psutil.virtual_memory().available * 3 // 4

    @functools.cached_property
    def n_workers(self) -> int:
        return self.processes or max(1, min(os.cpu_count() or 1, self.budget // WORKER_BYTES))

    @functools.cached_property
    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.n_workers, get_context("spawn"), _begin_worker)

    def run(self, stage: Stage, numbers: Sequence[int]) -> Iterator[int]:
        """Runs the items and yields the number of each when it is done, in any order."""
        if self.n_workers == 1 or len(numbers) == 1:
            for number in numbers:
                stage.run_item(number)
                yield number
            return
        futures = {self._pool.submit(run_item, stage.folder, number): number for number in numbers}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            self.close()  # the next build starts new processes
            raise CorpusError(
                f"a worker of stage {stage.name!r} died, most likely because memory ran out; run the same command "
                f"again with fewer processes than {self.n_workers} to continue from here"
            ) from error
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        if (pool := self.__dict__.pop("_pool", None)) is not None:
            pool.shutdown(cancel_futures=True)


def run_item(folder: Path, number: int) -> None:
    """Runs one item of the stage that ``run_stage`` saved in the folder."""
    Stage.load(folder).run_item(number)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes, and only the parent shows a message
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Ends this worker with its parent; otherwise it would wait for items for ever after the parent was killed."""
    parent = parent_process()
    assert parent is not None  # this is a worker
    connection.wait([parent.sentinel])
    os._exit(1)
