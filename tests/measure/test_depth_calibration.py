"""What a stored depth calibration recommends, and what it refuses."""

import pytest

from efftrain.errors import ConfigError
from efftrain.measure.depth.depth_calibration import Calibrated


def calibrated(**rules: float | None) -> Calibrated:
    exits = {rule: {"threshold": threshold} for rule, threshold in rules.items()}
    return Calibrated({"confidence_exit": exits, "self_speculation": {"exit_layer": 2, "n_draft": 3}}, None)


def test_an_exit_has_the_threshold_of_its_rule():
    found = calibrated(similarity=0.97, gap=0.5)
    assert (found.exit().rule, found.exit().threshold) == ("similarity", 0.97)
    assert found.exit("gap").threshold == 0.5


def test_a_rule_without_a_threshold_within_the_risk_is_refused():
    with pytest.raises(ConfigError, match="no threshold of rule 'similarity' within its risk"):
        calibrated(similarity=None).exit()
    with pytest.raises(ConfigError, match="has no rule 'probe'"):
        calibrated(similarity=0.9).exit("probe")


def test_a_draft_is_the_fastest_and_a_routed_model_has_none():
    assert calibrated().speculation().exit_layer == 2
    with pytest.raises(ConfigError, match="is of a model of routed depth"):
        Calibrated({"routed_depth": {}}, None).speculation()
