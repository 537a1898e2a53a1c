"""Figures of a step that say that a run is going wrong, and what to do about it."""

from collections.abc import Mapping
from dataclasses import dataclass

from efftrain.models.moe import layer as moe


@dataclass(frozen=True)
class Alarm:
    """What is said, once, when a figure of the training metrics rises above ``above``."""

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
    """Says each alarm the first time that its figure calls for it."""

    def __init__(self) -> None:
        self._waiting = list(ALARMS)

    def heard(self, figures: Mapping[str, float]) -> list[str]:
        """The sentences that a step's figures call for."""
        found = [alarm for alarm in self._waiting if figures.get(alarm.figure, 0.0) > alarm.above]
        self._waiting = [alarm for alarm in self._waiting if alarm not in found]
        return [f"{alarm.sentence} ({alarm.figure} {figures[alarm.figure]:.3g})" for alarm in found]
