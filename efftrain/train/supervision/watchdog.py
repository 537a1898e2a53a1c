"""The watchdog: a thread that notices when a run hangs, and writes the stacks of all threads to a file."""

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from efftrain.errors import ConfigError
from efftrain.sharding import hosts
from efftrain.train.metrics.timing import IN_STEP, Timing, WatchdogStatus
from efftrain.train.supervision.supervise import is_supervised

EXIT_HUNG = 70  # EX_SOFTWARE: nothing was saved; the same command continues from the newest checkpoint


@dataclass(frozen=True, kw_only=True)
class Watchdog:
    """When a run counts as hung, and what happens then.

    Attributes:
      factor: a step may take this many times the median of the recent steps. None: no watchdog.
      min_s: seconds that a step may always take.
      aside_s: seconds that compiling, an evaluation or a checkpoint may take, and a step while there is no median yet.
      end: also end the process, with code 70. None: end it if ``efftrain train`` will restart it.
    """

    factor: float | None = 20.0
    min_s: float = 300.0
    aside_s: float = 7200.0
    end: bool | None = None

    def __post_init__(self):
        if self.factor is not None and not self.factor > 1:
            raise ConfigError(f"watchdog.factor is {self.factor}; give a number above 1, or None to watch nothing")
        for name in ("min_s", "aside_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"watchdog.{name} is {getattr(self, name)}; give a positive number of seconds")

    def timeout_s(self, status: WatchdogStatus) -> float:
        """Returns how many seconds the present step or phase may last."""
        if status.phase not in IN_STEP or status.median_s is None or self.factor is None:
            return max(self.aside_s, self.min_s)
        return max(self.min_s, self.factor * status.median_s)

    @contextlib.contextmanager
    def watch(self, timing: Timing, directory: Path) -> Generator[None]:
        """Watches the loop in this context from a thread.

        If the loop hangs, each process appends its stacks to ``stacks-PROCESS.txt`` in the directory.

        Args:
          timing: times of the loop.
          directory: the run directory.
        """
        if self.factor is None:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._watch, args=(timing, directory, done), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, timing: Timing, directory: Path, done: threading.Event) -> None:
        reported = False
        while not done.wait(min(5.0, self.min_s / 10)):
            status = timing.status()
            late = status.quiet_s > self.timeout_s(status)
            if late and not reported:
                self._report(status, directory)
            reported = late

    def _report(self, status: WatchdogStatus, directory: Path) -> None:
        end = is_supervised() if self.end is None else self.end
        process = hosts.process_index()
        try:
            where = f"what each thread was doing is in {dump(directory, process, status)}"
        except OSError as error:
            where = f"the stacks could not be written ({error})"
        what = "no step" if status.phase in IN_STEP else "no end"
        then = f"ending with code {EXIT_HUNG}" if end else "waiting on; end it with Ctrl-C or kill"
        # Not through rich, because the thread that hangs may hold its lock.
        sentence = (
            f"error: process {process} hangs in {status.phase}: {what} for {status.quiet_s:.0f} s, where the timeout "
            f"is {self.timeout_s(status):.0f} s (--training.watchdog); {where}; {then}\n"
        )
        os.write(2, sentence.encode())
        if end:
            os._exit(EXIT_HUNG)  # the main thread hangs, so that it cannot be asked to end


def dump(directory: Path, process: int, status: WatchdogStatus) -> Path:
    """Appends the Python stacks of all threads of this process to a file, and returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"stacks-{process}.txt"
    with path.open("a") as file:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        file.write(f"\n{moment}, {os.uname().nodename}, in {status.phase} for {status.quiet_s:.0f} s\n")
        file.flush()  # faulthandler writes to the file descriptor
        faulthandler.dump_traceback(file, all_threads=True)
    return path
