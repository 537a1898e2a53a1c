"""Notices that another process of the run ended, prints one sentence about it, and ends this process."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from efftrain.errors import EfftrainError
from efftrain.progress import console
from efftrain.sharding import hosts

EXIT_LOST = 76  # EX_PROTOCOL: another process is gone; the same command continues from the newest checkpoint
BROKEN = ("Gloo", "NCCL", "connection", "Connection")  # in errors of a collective whose other end is gone


class Peers:
    """Context manager in which this process ends soon after any other one ended; does nothing for a single process.

    Without it a collective waits for ever for the lost process (NCCL, TPU), or JAX aborts with a C++ stack trace. A
    thread of each process writes a sign of life and waits for news from the others; process 0 watches the signs.
    If there is no error, the context ends on all processes together.
    """

    def __init__(self) -> None:
        self._client, self._me, self._thread = hosts._client(), hosts.process_index(), None
        self._place = f"efftrain/peers/{next(hosts._calls)}"
        self._interval_s = max(0.25, hosts._lost_after_s / 5)
        self._leaving = False
        self._ending = threading.Lock()

    def __enter__(self) -> "Peers":
        if self._client is not None:
            _delay_abort()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
            if self._me:
                threading.Thread(target=self._watch_coordinator, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if self._thread is None:
            return
        if error is None or isinstance(error, SystemExit):
            hosts.exchange("done")
            self._leaving = True
            self._tell({})
            self._thread.join(self._interval_s + 1)
            return
        if isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN):
            self._thread.join(2 * hosts._lost_after_s)  # the thread says who was lost, and ends this process
        if not self._ending.acquire(blocking=False):
            self._thread.join()  # the thread prints the message of another process, and ends this one
        self._leaving = True
        ours = isinstance(error, EfftrainError)
        sentence = str(error) if ours else f"{type(error).__name__}: {hosts._first_line(error)}"
        code = 2 if ours else 1
        self._tell({"sentence": f"process {self._me}: {sentence}", "code": code})
        if ours:
            console.print(f"error: {error}", style="red", markup=False)
        else:
            traceback.print_exception(error)
        self._end(code)

    def _watch(self) -> None:
        counts: dict[int, tuple[str, float]] = {}
        for count in range(sys.maxsize):
            try:
                self._client.key_value_set(f"{self._place}/alive/{self._me}", str(count), allow_overwrite=True)
                news = self._client.blocking_key_value_get(f"{self._place}/news", round(1000 * self._interval_s))
                break
            except RuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    news = json.dumps(_lost(0))
                    break
            if self._leaving:
                return
            if self._me == 0 and (silent := self._silent(counts)):
                self._tell(_lost(silent[0]))
        found = json.loads(news)
        if found and not self._leaving:
            self._say_and_end(found)

    def _watch_coordinator(self) -> None:
        """Keeps a silent connection only to notice its end, because JAX aborts milliseconds after process 0 is gone."""
        while True:
            try:
                with hosts.reach_coordinator() as connection:
                    while connection.recv(4096):
                        pass
            except ConnectionRefusedError:
                break
            except OSError:
                time.sleep(0.1)  # the server drops silent connections, which does not mean that process 0 is gone
        if not self._leaving:
            self._say_and_end(_lost(0))

    def _silent(self, counts: dict[int, tuple[str, float]]) -> list[int]:
        """Processes whose sign of life has not changed for too long; ``counts``: the last sign, and since when."""
        now = time.monotonic()
        alive = self._client.key_value_dir_get(f"{self._place}/alive")
        signs = {int(name.rsplit("/", 1)[1]): sign for name, sign in alive}
        for number in range(1, hosts.process_count()):
            sign = signs.get(number, "")
            if number not in counts or counts[number][0] != sign:
                counts[number] = sign, now
        return [number for number, (_, since) in counts.items() if now - since > hosts._lost_after_s]

    def _tell(self, news: dict[str, Any]) -> None:
        with contextlib.suppress(RuntimeError):  # another process was first, or the coordinator is gone
            self._client.key_value_set(f"{self._place}/news", json.dumps(news))

    def _say_and_end(self, news: dict[str, Any]) -> None:
        if self._ending.acquire(blocking=False):
            console.print(f"error: {news['sentence']}", style="red", markup=False)
            self._end(news["code"])

    def _end(self, code: int) -> None:
        """Ends at once: JAX's own exit waits for the other processes, and aborts if one does not come."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._me == 0:
            time.sleep(1.0)  # the store ends with this process; lets the others read it first
        os._exit(code)


def _delay_abort() -> None:
    """Makes ``abort()`` from C++ sleep 6 seconds first, because JAX aborts as soon as process 0 is gone.

    This leaves time to print who was lost. The handler is the C library's ``sleep``, which gets the signal's number, 6;
    no Python runs in it.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _lost(number: int) -> dict[str, Any]:
    return {
        "sentence": f"process {number} of this run ended or cannot be reached; look at its log, then start "
        "the same command on all hosts: it continues from the newest checkpoint",
        "code": EXIT_LOST,
    }
