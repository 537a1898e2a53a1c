"""Runs a recipe as a process of its own, and starts it again when it ended before its work was done."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from efftrain.errors import ConfigError
from efftrain.progress import console

PROGRESS_FILE = "EFFTRAIN_PROGRESS_FILE"  # of a supervised process: where it writes the step of its checkpoint
EXIT_MISTAKE = 2
LONGEST_PAUSE_S = 300.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def is_supervised() -> bool:
    """Whether a supervisor will start this process again."""
    return PROGRESS_FILE in os.environ


def report_checkpoint(step: int) -> None:
    """Tells the supervisor, if there is one, that the next process can continue from this step."""
    if is_supervised():
        Path(os.environ[PROGRESS_FILE]).write_text(str(step))


def supervise(command: Sequence[str], *, max_restarts: int, first_pause_s: float = 1.0) -> int:
    """Runs a command until it is done.

    It is started again after a crash, a kill, the end by a watchdog, and code 75 (all saved, continue later), each time
    after a pause twice as long as the one before. It is not after code 2 (a mistake that the user must mend), nor
    after a signal to this process, which is passed on.

    Args:
      command: the program and its arguments.
      max_restarts: give up after so many in a row that found no newer checkpoint (see ``report_checkpoint``).
      first_pause_s: doubled with each restart that found no newer checkpoint, up to 5 minutes.

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
                        f"checkpoint behind step {newest}; mend what its last lines say, then the same command "
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
    """One process at a time, which gets the signals that this one gets."""

    def __init__(self, command: Sequence[str], progress_file: Path):
        self._command, self._progress_file = list(command), progress_file
        self._process: subprocess.Popen | None = None
        self._signals: list[int] = []
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_Child":
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def stopped(self) -> bool:
        """Whether somebody asked this process to end, or pressed Ctrl-C."""
        return bool(self._signals)

    def run(self) -> int:
        # A group of its own: the terminal sends Ctrl-C to a whole group, and with the one passed on it would be two.
        environment = os.environ | {PROGRESS_FILE: str(self._progress_file)}
        self._process = subprocess.Popen(self._command, env=environment, process_group=0)
        for number in self._signals:  # one that came while it was being started
            self._process.send_signal(number)
        code = self._process.wait()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # workers of a process that was killed hold memory
        return 128 - code if code < 0 else code

    def checkpoint(self) -> int:
        """The newest step that a process has reported; 0 where none has."""
        return int(self._progress_file.read_text() or 0) if self._progress_file.exists() else 0

    def pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.stopped and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        if self._process is not None:
            self._process.send_signal(number)  # nothing happens if it has ended
