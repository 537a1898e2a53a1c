"""Progress output that is readable both in a terminal and in a log file."""

import codecs
import io
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import rich.progress
from rich.console import Console

T = TypeVar("T")
console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
ASCII = {"•": "*", "…": "...", "µ": "u", "─": "-", "━": "-", "│": "|", "┃": "|", **dict.fromkeys("╭╮╰╯", "+")}


def print_error(error: BaseException, where: str = "") -> None:
    """Prints an error as one sentence on stderr, beginning with "error:" if the user made a mistake."""
    text = str(error) if isinstance(error, KeyboardInterrupt) else f"error: {error}"
    console.print(text + where, style="red", markup=False)


def write_in_any_locale() -> None:
    """Lets stdout and stderr print characters that their encoding lacks as similar ASCII (``ASCII``) or as escapes."""
    codecs.register_error("efftrain.ascii", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="efftrain.ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters), error.end


class Progress:
    """One line of progress: a bar with rate and time left in a terminal, a plain line every few seconds in a log.

    It is a context manager; ``advance`` moves the bar, ``note`` sets the text after it.

    Args:
      description: text before the bar.
      total: amount of work. None: not known.
      unit: unit of the amounts.
      initial: amount that an earlier process has done, which does not count for the time left.
      log_every_s: seconds between two lines in a log.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "",
        initial: float = 0.0,
        log_every_s: float = 10.0,
    ):
        """Creates the bar; it is shown within the context."""
        self.description, self.total, self.unit, self.log_every_s = description, total, unit, log_every_s
        self.done, self._initial, self._note = initial, initial, ""
        self._live = console.is_terminal
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.TextColumn("{task.completed:,.0f}/{task.fields[of]}" + (f" {unit}" if unit else "")),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(
            description,
            total=total,
            completed=initial,  # ty: ignore[invalid-argument-type]  # a float as in rich's ``update``
            note="",
            of=f"{total:,.0f}" if total else "?",
        )

    def __enter__(self) -> "Progress":
        self._start = self._logged = time.monotonic()
        self._bar.start()
        return self

    def __exit__(self, exc_type: object, *rest: object) -> None:
        self._bar.stop()
        if not self._live:
            self._log("done" if exc_type is None else "stopped")

    def advance(self, amount: float = 1.0) -> None:
        self.done += amount
        self._bar.advance(self._task, amount)
        if not self._live and time.monotonic() - self._logged > self.log_every_s:
            self._log()

    def note(self, text: str) -> None:
        self._note = text
        self._bar.update(self._task, note=text)

    def print(self, text: str) -> None:
        """Prints a separate line above the bar."""
        console.print(text, markup=False)

    def _log(self, word: str = "") -> None:
        self._logged = time.monotonic()
        elapsed = self._logged - self._start
        of = f"/{self.total:,.0f}" if self.total else ""
        left = ""
        fresh = self.done - self._initial
        if self.total and fresh and not word:
            left = f", {elapsed * (self.total - self.done) / fresh:.0f} s left"
        state = f"{self.done:,.0f}{of} {self.unit}".rstrip()
        text = f"{self.description}: {state}, {elapsed:.0f} s{left} {self._note} {word}"
        console.print(text.rstrip(), markup=False)


def track(items: Iterable[T], description: str, total: float | None = None, *, unit: str = "") -> Iterator[T]:
    """Yields the items and shows a ``Progress``."""
    with Progress(description, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
