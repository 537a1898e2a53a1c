"""Where the time of a run goes."""

import time

import numpy as np


class Timing:
    """Step times, measured from the arrival of one step's metrics to that of the next.

    Args:
      tokens_per_step: over all devices.
      flops_per_token: model FLOPs of a training token; None leaves utilisation out.
      peak_flops: of all devices together, dense bf16; None where it is not known.
    """

    def __init__(self, tokens_per_step: int, flops_per_token: float | None, peak_flops: float | None):
        self._tokens, self._flops, self._peak = tokens_per_step, flops_per_token, peak_flops
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._last: float | None = None
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        """Notes a wait for input: part of the time until the next arrival, whichever step's batch it was."""
        self._waited += seconds

    def step_arrived(self) -> dict[str, float]:
        """Notes a step; the figures of this one step, empty where its time means nothing."""
        now, last, waited = time.perf_counter(), self._last, self._waited
        self._last, self._waited = now, 0.0
        if last is None:
            return {}
        self._steps.append(now - last)
        self._waits.append(waited)
        return self._rates(now - last) | {"step_s": now - last, "input_wait_s": waited}

    def interrupt(self) -> None:
        """What comes is no step after a step (an evaluation, a checkpoint): the next arrival starts anew."""
        self._last = None

    def figures(self) -> dict[str, float]:
        """Over all steps noted: median and 95th percentile of the step time, rates at the median, share of waiting."""
        if not self._steps:
            return {}
        p50, p95 = np.percentile(self._steps, [50, 95])
        return self._rates(p50) | {
            "step_s_p50": float(p50),
            "step_s_p95": float(p95),
            "input_wait_share": sum(self._waits) / sum(self._steps),
        }

    def _rates(self, step_s: float) -> dict[str, float]:
        tokens_per_s = float(self._tokens / step_s)
        rates = {"tokens_per_s": tokens_per_s}
        if self._flops and self._peak:
            rates["mfu"] = tokens_per_s * self._flops / self._peak
        return rates
