"""What an export says of a run beyond its configuration: its early exits, and the zeros of pruning."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.class_names import class_name, current_name
from efftrain.interop.run_arrays import Blocks, Variable
from efftrain.measure.depth.depth_calibration import FILE_NAME as DEPTH
from efftrain.models.config import ModelConfig
from efftrain.train.objectives.objective import EarlyExitLoss
from efftrain.train.run.directory import read_json

PRUNED = 0.01  # share of zeros from which a model counts as pruned; rounding to 4 bits leaves fewer in its source


def early_exits(run: Path, config: ModelConfig) -> dict[str, Any] | None:
    """Returns the exits of a run that was trained with ``EarlyExitLoss``; None: it has none.

    Returns:
      ``layers``: numbers of layers after which the norm and the head of the model read its states. If the depth of the
      run was calibrated and drafts make it faster, ``draft`` has the ``exit_layer`` and the ``n_draft`` tokens of them.
    """
    settings = read_json(run / "config.json")
    kinds = {current_name(str(value.get("type"))) for value in settings.values() if isinstance(value, Mapping)}
    if class_name(EarlyExitLoss) not in kinds:
        return None
    # Of the layers, each step trains some that are ``every`` apart; over the steps it is all of them.
    exits: dict[str, Any] = {"layers": list(range(1, config.n_layers))}
    if (run / DEPTH).is_file():
        best = read_json(run / DEPTH).get("self_speculation") or {}
        if best.get("exit_layer") is not None:
            exits["draft"] = {name: best[name] for name in ("exit_layer", "n_draft")}
    return exits


def exits_note(exits: Mapping[str, Any]) -> str:
    """Returns the sentence of a plan for ``early_exits``."""
    use = exits.get("draft", {}).get("exit_layer", "LAYERS")
    return (
        f"All layers are exported; the early exits after layers 1 to {exits['layers'][-1]}, through the same norm and "
        f"head, are only named, in the field efftrain of a config.json (in transformers: "
        f"generate(assistant_early_exit={use}))."
    )


class ZeroCount:
    """Counts the zeros in the matrices of the layers, as their blocks pass."""

    def __init__(self) -> None:
        self._zeros = self._size = 0

    def counted(self, variables: Mapping[str, Variable]) -> dict[str, Variable]:
        """Returns the variables, which are counted as their blocks are read."""
        return {name: replace(variable, blocks=self._count(name, variable)) for name, variable in variables.items()}

    def _count(self, name: str, variable: Variable) -> Blocks:
        for index, block in variable.blocks:
            if name.startswith("blocks/") and block.ndim > 2:
                self._zeros += block.size - np.count_nonzero(block)
                self._size += block.size
            yield index, block

    @property
    def notes(self) -> tuple[str, ...]:
        """The sentence of a plan for a pruned model; empty for others."""
        if self._zeros < PRUNED * self._size or not self._zeros:
            return ()
        share = self._zeros / self._size
        return (
            f"{share:.0%} of the weights of the layers are zero. They are stored as zeros and computed with: zeros, no "
            "speed.",
        )
