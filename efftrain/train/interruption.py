"""SIGTERM and Ctrl-C as a wish that the loop fulfils at the end of a step."""

import signal
from types import FrameType


class Interruption:
    """Within the context, the first SIGTERM or SIGINT only sets ``asked``; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.asked: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
