"""Alerts: warnings when a metric of a step says that the run is going wrong, with what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from efftrain.models.moe import layer as moe


@dataclass(frozen=True)
class Alert:
    """A warning that is printed once, when a figure of the training metrics rises above a threshold.

    Attributes:
      figure: name of the metric.
      above: the threshold.
      sentence: the text of the warning.
    """

    figure: str
    above: float
    sentence: str


ALERTS = (
    Alert(
        moe.COLLAPSED,
        0.0,
        f"experts have had less than {moe.STARVED_SHARE:.0%} of the mean load for {moe.STARVED_STEPS} steps and learn "
        "nothing; raise moe.bias_rate, add moe.auxiliary_loss 0.01, lower optimizer.peak_lr, or use fewer experts",
    ),
)


class Alerts:
    """Gives each alert the first time that its figure is above its threshold."""

    def __init__(self) -> None:
        self._waiting = list(ALERTS)

    def check(self, figures: Mapping[str, float]) -> list[str]:
        """Returns the sentences of the alerts that a step's figures set off for the first time."""
        found = [alert for alert in self._waiting if figures.get(alert.figure, 0.0) > alert.above]
        self._waiting = [alert for alert in self._waiting if alert not in found]
        return [f"{alert.sentence} ({alert.figure} {figures[alert.figure]:.3g})" for alert in found]
