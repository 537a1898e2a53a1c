"""Another process that holds a lock until it is killed: ``Holder``, which starts this file: FILE PATH [CHILD].

With CHILD (fork, spawn or subprocess) it starts a child that outlives it, whose number it prints too.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

from efftrain.lock import Lock


class Holder:
    """The process; ``kill`` ends it with SIGKILL."""

    def __init__(self, file: Path, path: Path, *child: str):
        command = [sys.executable, __file__, str(file), str(path), *child]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid, *self.children = map(int, self._process.stdout.readline().split())

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


def wait(ready=None) -> None:
    if ready is not None:
        ready.set()
    time.sleep(60)


if __name__ == "__main__":
    lock = Lock(Path(sys.argv[1]), Path(sys.argv[2]))
    child = ""
    if sys.argv[3:] == ["subprocess"]:
        child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, close_fds=False).pid
    elif sys.argv[3:]:
        context = multiprocessing.get_context(sys.argv[3])
        ready = context.Event()
        process = context.Process(target=wait, args=(ready,))
        process.start()
        ready.wait()
        child = process.pid
    print(os.getpid(), child, flush=True)
    wait()
