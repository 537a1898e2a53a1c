"""Runs of which steps are traced, each into a folder of its own; what each prints is kept beside it.

Started by test_profile.py.
"""

import contextlib
import signal
import sys
from pathlib import Path

import tiny

from efftrain.progress import console
from efftrain.train.run.directory import Run

FOLDER = Path(sys.argv[1])


@contextlib.contextmanager
def kept(name: str):
    with (FOLDER / f"{name}.txt").open("w") as file:
        console.file = file
        yield FOLDER / name


with kept("whole") as out:
    tiny.train(out, profile="4:6")
with kept("times") as out:
    tiny.train(out, profile="4:5", checkpoint_every=100)
with kept("continued") as out:  # after step 6
    tiny.train(out, profile="5:7")
    Run(out, tiny.Config())  # the field makes no other run: this is not refused
with kept("interrupted") as out, contextlib.suppress(SystemExit):
    tiny.train(out, tiny.Walks(kill_self=(5, signal.SIGTERM)), profile="4:8")
