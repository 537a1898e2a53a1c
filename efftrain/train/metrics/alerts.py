"""Alerts: warnings when a metric of a step says that the run is going wrong, with what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from efftrain.models.moe import layer as moe


@dataclass(frozen=True)
class Alarm:
    """A warning that is printed once, when a figure of the training metrics rises above a limit.

    Attributes:
      figure: name of the metric.
      above: the limit.
      sentence: the text of the warning.
    """

    figure: str
    above: float
    sentence: str


ALARMS = (
    Alarm(
        moe.COLLAPSED,
        0.0,
        f"experts have had less than {moe.STARVED_SHARE:.0%} of the mean load for {moe.STARVED_STEPS} steps and learn "
        "nothing; raise moe.bias_rate, add moe.auxiliary_loss 0.01, lower optimizer.peak_lr, or use fewer experts",
    ),
)


class Alerts:
    """Gives each alarm the first time that its figure is above the limit."""

    def __init__(self) -> None:
        self._waiting = list(ALARMS)

    def heard(self, figures: Mapping[str, float]) -> list[str]:
        """Returns the sentences of the alarms that a step's figures set off for the first time."""
        found = [alarm for alarm in self._waiting if figures.get(alarm.figure, 0.0) > alarm.above]
        self._waiting = [alarm for alarm in self._waiting if alarm not in found]
        return [f"{alarm.sentence} ({alarm.figure} {figures[alarm.figure]:.3g})" for alarm in found]
