"""The depth calibration that is stored in a run: how it is read, and which decoding it recommends."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from efftrain.errors import ConfigError, RunError
from efftrain.measure.depth.exit_curves import RULES
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.self_speculation import SelfSpeculation
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe, Rule
from efftrain.train.inputs import model_digest
from efftrain.train.run.directory import read_json

FILE_NAME, PROBE_NAME = "depth.json", "depth_probe.npz"


@dataclass(frozen=True)
class Calibrated:
    """A calibration that was read from a run, valid for the model of that run.

    Attributes:
      values: content of ``depth.json``.
      probe: the probe of the rule "probe"; None for a model of routed depth.
    """

    values: Mapping[str, Any]
    probe: ExitProbe | None

    def speculation(self) -> SelfSpeculation:
        """The fastest self-speculation of those that gave the same tokens as plain decoding.

        Raises:
          ConfigError: the model cannot draft for itself, or no draft was faster than plain decoding.
        """
        self._check_not_routed()
        best = self.values["self_speculation"]
        if best["exit_layer"] is None:
            raise ConfigError(
                "depth.json has no draft that is faster than plain decoding at equal tokens; decode with all layers"
            )
        return SelfSpeculation(exit_layer=best["exit_layer"], n_draft=best["n_draft"])

    def exit(self, rule: Rule = "similarity") -> ConfidenceExit:
        """The early exit with the threshold that leaves out the most layers within the risk of the calibration.

        Args:
          rule: one of ``exit_curves.RULES``.

        Raises:
          ConfigError: there is no such rule, or none of its thresholds is within the risk.
        """
        self._check_not_routed()
        found = self.values["confidence_exit"].get(rule)
        if not found:
            raise ConfigError(f"depth.json has no rule {rule!r}; use one of {', '.join(RULES)}")
        if found["threshold"] is None:
            raise ConfigError(
                f"depth.json has no threshold of rule {rule!r} within its risk; calibrate with a larger --risk or more "
                "--rows, or decode with all layers"
            )
        return ConfidenceExit(rule=rule, threshold=found["threshold"])

    def _check_not_routed(self) -> None:
        if "routed_depth" in self.values:
            raise ConfigError(
                "depth.json is of a model of routed depth, which already skips layers; decode without depth"
            )


def read_calibration(run: Path | str, model: Decoder) -> Calibrated:
    """Reads the calibration of a run; the version of the package that made it does not matter.

    Args:
      run: run directory.
      model: the model of the run; the calibration must be of this model.

    Raises:
      RunError: there is no calibration, or it is of another model.
    """
    path = Path(run) / FILE_NAME
    if not path.exists():
        raise RunError(f"there is no {path}; make it with: efftrain calibrate-depth {run}")
    values = read_json(path)
    if values.get("model") != model_digest(model):
        raise RunError(f"{path} was measured on another model; measure this one with: efftrain calibrate-depth {run}")
    probe = path.with_name(PROBE_NAME)
    if not probe.exists():
        return Calibrated(values, None)
    with np.load(probe) as arrays:
        return Calibrated(values, ExitProbe(jnp.asarray(arrays["kernel_ed"]), jnp.asarray(arrays["bias_e"])))


def write_probe(path: Path, probe: ExitProbe) -> None:
    """Writes the probe's parameters as ``PROBE_NAME``; a file that exists is replaced at once."""
    temporary = path.with_name(f"writing-{path.name}")
    np.savez(temporary, kernel_ed=np.asarray(probe.kernel_ed), bias_e=np.asarray(probe.bias_e))
    os.replace(temporary, path)
