"""A tiny recipe with a plan of what befalls its starts. Started by test_supervise.py: OUT FOLDER PLAN STEPS.

PLAN names, comma by comma, how each start ends: ``done``, ``crash`` (before its first step), ``raise:STEP``,
``kill:STEP`` and ``term:STEP`` (signals to itself), ``wait:STEP`` (until somebody ends it), ``code:CODE``. Checkpoints
are every 3 steps.
"""

import os
import signal
import sys
import time
from pathlib import Path

import tiny

from efftrain.recipe import exit_cleanly

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


class Waits(tiny.Walks):
    def __init__(self, at: int, ready: Path):
        super().__init__()
        self._at, self._ready = at, ready

    def __next__(self):
        if self.taken + 1 == self._at:
            self._ready.touch()
            while not self._ready.with_name("go").exists():
                time.sleep(0.01)
        return super().__next__()


def main(out: Path, folder: Path, plan: list[str], steps: int) -> None:
    number = len(list(folder.glob("start-*")))
    (folder / f"start-{number}").write_text(str(os.getpid()))
    word, _, value = plan[min(number, len(plan) - 1)].partition(":")
    if word == "crash":
        raise RuntimeError("before the first step")
    if word == "code":
        raise SystemExit(int(value))
    batches = {
        "done": lambda: tiny.Walks(),
        "raise": lambda: tiny.Walks(crash_at=int(value)),
        "wait": lambda: Waits(int(value), folder / "ready"),
    }.get(word, lambda: tiny.Walks(kill_self=(int(value), SIGNALS[word])))()
    tiny.train(out, batches, steps=steps)


if __name__ == "__main__":
    with exit_cleanly():
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), int(sys.argv[4]))
