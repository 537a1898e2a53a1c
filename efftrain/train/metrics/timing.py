"""Timing: the wall time of a run by phase, step times and rates."""

import contextlib
import statistics
import time
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

IN_STEP = ("input_wait", "compute")
ASIDE = ("compile", "evaluation", "checkpoint", "profile")
N_RECENT = 100  # number of recent steps whose median a watchdog compares with


@dataclass(frozen=True)
class WatchdogStatus:
    """What a watchdog sees.

    Attributes:
      phase: the present phase of the loop, see ``Timing``.
      quiet_s: seconds since the last step, or since a phase other than ``input_wait`` and ``compute`` began or ended.
      median_s: median seconds of recent steps. None: no step has a time yet.
    """

    phase: str
    quiet_s: float
    median_s: float | None


class Timing:
    """The wall time of the loop by phase, and step times from the arrival of one step's metrics to that of the next.

    At each moment the host is in one phase, so that the phases add up to the wall time: ``input_wait`` for a batch (on
    an accelerator, part of it may pass while the device still computes), one of ``compile``, ``evaluation``,
    ``checkpoint`` (as far as the loop waits for it) and ``profile``, and otherwise ``compute``.

    Args:
      tokens_per_step: number of tokens per step, over all devices.
      flops_per_token: model FLOPs of one training token. None: utilisation is not reported.
      peak_flops: dense bf16 FLOPs per second of all devices together. None: not known.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float | None, peak_flops: float | None):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._last: float | None = None
        self._phase = "compute"
        self._since = self._beat = time.perf_counter()
        self._row = dict.fromkeys(IN_STEP, 0.0)  # seconds of each phase since the row before
        self._totals: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Counts the time in this context as the given phase, and not as the phase around it."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def step_arrived(self) -> dict[str, float]:
        """Records a step; returns the seconds of each phase since the step before, its step time and rates.

        Step time and rates are left out after an interruption, see ``interrupt``.
        """
        self._account()
        now, last, row = self._since, self._last, self._row
        self._last, self._beat, self._row = now, now, dict.fromkeys(IN_STEP, 0.0)
        times = {f"{phase}_s": seconds for phase, seconds in row.items()}
        if last is None:
            return times
        self._steps.append(now - last)
        self._waits.append(row["input_wait"])
        return self._rates(now - last) | {"step_s": now - last} | times

    def interrupt(self) -> None:
        """Says that something other than a step follows (an evaluation, a checkpoint): the next step gets no time."""
        self._last = None

    def status(self) -> WatchdogStatus:
        """Returns what a watchdog needs; may be called from another thread."""
        recent = self._steps[-N_RECENT:]
        quiet_s = time.perf_counter() - self._beat
        return WatchdogStatus(self._phase, quiet_s, statistics.median(recent) if recent else None)

    def figures(self) -> dict[str, float]:
        """Returns the figures of the run so far.

        These are the seconds of each phase and of all phases together; and, over all steps that have a time, median and
        95th percentile of the step time, rates at the median, and the share of waiting for input.
        """
        self._account()
        wall_s = sum(self._totals.values())
        split = {f"{phase}_s": seconds for phase, seconds in self._totals.items()} | {"wall_s": wall_s}
        if wall_s:
            split |= {f"{name}_share": self._totals.get(name, 0.0) / wall_s for name in ("evaluation", "checkpoint")}
        if not self._steps:
            return split
        p50, p95 = np.percentile(self._steps, [50, 95])
        return (
            split
            | self._rates(p50)
            | {
                "step_s_p50": float(p50),
                "step_s_p95": float(p95),
                "input_wait_share": sum(self._waits) / sum(self._steps),
            }
        )

    def _enter(self, name: str) -> None:
        self._account()
        if name in ASIDE or self._phase in ASIDE:
            self._beat = self._since
        self._phase = name

    def _account(self) -> None:
        now = time.perf_counter()
        for seconds in (self._row, self._totals):
            seconds[self._phase] = seconds.get(self._phase, 0.0) + now - self._since
        self._since = now

    def _rates(self, step_s: float) -> dict[str, float]:
        tokens_per_s = float(self._tokens / step_s)
        rates = {"tokens_per_s": tokens_per_s}
        if self._flops and self._peak:
            rates["mfu"] = tokens_per_s * self._flops / self._peak
        return rates
