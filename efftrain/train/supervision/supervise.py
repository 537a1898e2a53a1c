"""The supervisor: it runs a recipe in a process of its own, and restarts it when it ends before its work is done."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from efftrain.errors import ConfigError
from efftrain.progress import console

PROGRESS_FILE = "EFFTRAIN_PROGRESS_FILE"  # variable with the file to which a supervised process writes its saved step
EXIT_MISTAKE = 2
LONGEST_PAUSE_S = 300.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def is_supervised() -> bool:
    """Returns whether a supervisor will restart this process."""
    return PROGRESS_FILE in os.environ


def report_checkpoint(step: int) -> None:
    """Tells the supervisor, if there is one, the step from which the next process can continue."""
    if is_supervised():
        Path(os.environ[PROGRESS_FILE]).write_text(str(step))


def supervise(command: Sequence[str], *, max_restarts: int, first_pause_s: float = 1.0) -> int:
    """Runs a command, and restarts it until it is done.

    It is restarted after a crash, a kill, an end by the watchdog, and code 75 (all saved, continue later), each time
    after a pause twice as long as the one before. It is not restarted after code 2 (a mistake that the user must
    correct), nor after a signal to this process, which is passed on.

    Args:
      command: the program and its arguments.
      max_restarts: give up after this many consecutive restarts without a newer checkpoint (see ``report_checkpoint``).
      first_pause_s: seconds before the first restart; doubled with each restart without a newer checkpoint, up to 5
        minutes.

    Returns:
      The last exit code; 128 + n for a process that signal n ended.

    Raises:
      ConfigError: ``max_restarts`` is negative.
    """
    if max_restarts < 0:
        raise ConfigError(f"--max-restarts is {max_restarts}; give 0 or more")
    with tempfile.TemporaryDirectory(prefix="efftrain-") as folder, _Child(command, Path(folder) / "progress") as child:
        newest = restarts = 0
        while True:
            code = child.run()
            if code in (0, EXIT_MISTAKE) or child.stopped:
                return code
            if child.checkpoint() > newest:
                newest, restarts = child.checkpoint(), 0
            if restarts == max_restarts:
                if max_restarts:
                    console.print(
                        f"error: the recipe ended with code {code}, and {restarts} restarts in a row brought no "
                        f"checkpoint after step {newest}; correct the error in its last lines, then the same command "
                        "continues",
                        style="red",
                        markup=False,
                    )
                return code
            pause_s = min(first_pause_s * 2**restarts, LONGEST_PAUSE_S)
            restarts += 1
            console.print(
                f"the recipe ended with code {code}; starting it again in {pause_s:.0f} s (restart {restarts} of "
                f"{max_restarts} since step {newest})",
                markup=False,
            )
            child.pause(pause_s)
            if child.stopped:
                return code


class _Child:
    """Runs one process at a time and passes on to it the signals that this process gets."""

    def __init__(self, command: Sequence[str], progress_file: Path):
        self._command, self._progress_file = list(command), progress_file
        self._process: subprocess.Popen | None = None
        self._signals: list[int] = []
        self._previous: dict[int, Any] = {}  # what ``signal.signal`` returned

    def __enter__(self) -> "_Child":
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored under nohup: stays ignored
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def stopped(self) -> bool:
        """Whether this process got a signal to end, such as Ctrl-C."""
        return bool(self._signals)

    def run(self) -> int:
        # In its own group: the terminal sends Ctrl-C to the whole group, and the child would get it a second time.
        environment = os.environ | {PROGRESS_FILE: str(self._progress_file)}
        self._process = subprocess.Popen(self._command, env=environment, process_group=0)
        for number in self._signals:  # signals that came while it was being started
            self._process.send_signal(number)
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the workers of a killed process still hold memory
        return 128 - code if code < 0 else code

    def checkpoint(self) -> int:
        """The newest step that a process has reported; 0 if none has."""
        return int(self._progress_file.read_text() or 0) if self._progress_file.exists() else 0

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._process is not None:
            self._process.send_signal(number)  # has no effect if the process has ended
