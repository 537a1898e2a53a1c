"""A calibration is of the model that was measured, to the last number and to the source of its blocks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny_models import PLAIN, build, config
from tiny_runs import OWN_BLOCK, VOCABULARY, with_own_block, write_corpus, write_run

import efftrain
from efftrain import code_identity
from efftrain.errors import RunError
from efftrain.measure.depth import calibrate_depth
from efftrain.measure.depth.calibrate_depth import DepthCalibration, calibrate
from efftrain.measure.depth.depth_calibration import read_calibration
from efftrain.models.depth.routed_depth import MixtureOfDepths

ROUTED = replace(PLAIN, depth=MixtureOfDepths(capacity=0.5))
MODEL = config(vocab_size=VOCABULARY, pattern=(PLAIN, ROUTED), n_repeats=1, max_length=32)
OPTIONS = DepthCalibration(rows=6, risk=0.9, error=0.5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture
def run(corpus, tmp_path):
    return with_own_block(write_run(tmp_path / "run", build(MODEL), corpus))


def test_a_calibration_is_read_for_its_model_alone(run, monkeypatch):
    calibrate(run, OPTIONS)
    model = efftrain.load(run)
    assert "routed_depth" in read_calibration(run, model).values
    with monkeypatch.context() as patch:  # by a later version of this package too: its figures stay true
        patch.setattr(code_identity, "package_identity", lambda rooms: "another version")
        read_calibration(run, model)
    table = np.array(model.embedding.table[...])
    assert table.size > 1000
    table[-1, -1] += 1
    model.embedding.table[...] = table
    with pytest.raises(RunError, match="was measured on another model"):
        read_calibration(run, model)
    (run / "recipe.py").write_text(OWN_BLOCK.replace("1.0", "2.0"))
    with pytest.raises(RunError, match="was measured on another model"):
        read_calibration(run, efftrain.load(run))


def test_what_other_code_measured_is_measured_again(run, monkeypatch, capfd):
    """Stopped after its first measurement, then the package was edited."""

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_depth, "write_json", stopped)
        with pytest.raises(KeyboardInterrupt):
            calibrate(run, OPTIONS)
    kept = run / ".depth.json.incomplete"
    before = json.loads(kept.read_text())
    before["cells"]["routed"] |= {"mean_depth": 99.0}
    kept.write_text(json.dumps(before))
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_depth, "write_json", stopped)
        patch.setattr(code_identity, "package_identity", lambda rooms: "another version")
        with pytest.raises(KeyboardInterrupt):
            calibrate(run, OPTIONS)
        assert "other code (changed since: efftrain); measuring again" in " ".join(capfd.readouterr().err.split())
        assert calibrate_depth.read_json(kept)["cells"]["routed"]["mean_depth"] != 99
    kept.write_text(json.dumps(before))
    assert calibrate(run, OPTIONS)["routed_depth"]["mean_depth"] == 99
