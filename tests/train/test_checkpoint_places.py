"""Where checkpoints are, and which of them stay."""

import json
from pathlib import Path

import pytest
import tiny

from efftrain.errors import ConfigError, RunError
from efftrain.train.checkpoints import Checkpoints
from efftrain.train.run import Run, load


def test_every_kth_checkpoint_stays_beside_the_newest(tmp_path):
    tiny.train(tmp_path / "run", checkpoint_every=1, keep_checkpoints=2, keep_every=3)
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [3, 6, 7, 8]


def test_a_permanent_checkpoint_must_be_one_that_is_saved():
    with pytest.raises(ConfigError, match="keep_every is 4; give a multiple of checkpoint_every 3"):
        tiny.dataclasses.replace(tiny.TRAINING, keep_every=4)


def test_checkpoints_elsewhere_are_continued_and_loaded(tmp_path, unbroken):
    elsewhere, out = str(tmp_path / "bucket" / "run"), tmp_path / "run"
    with pytest.raises(tiny.Crash):
        tiny.train(out, tiny.Walks(crash_at=5), checkpoints=elsewhere)
    assert not (out / "checkpoints").exists()
    fitted = tiny.train(out, checkpoints=elsewhere)
    assert tiny.numbers(out) == tiny.numbers(unbroken[0])
    tiny.assert_same_parameters(load(out), fitted.model)


def test_a_url_stays_one(tmp_path):
    config = tiny.Config(training=tiny.dataclasses.replace(tiny.TRAINING, checkpoints="gs://bucket/run"))
    run = Run(tmp_path / "run", config)
    assert str(run.checkpoints / "8") == "gs://bucket/run/8"
    assert json.loads((run.path / "config.json").read_text())["training"]["checkpoints"] == "gs://bucket/run"


@pytest.mark.parametrize("place", ["file/checkpoints", "/proc/checkpoints"])
def test_a_place_that_cannot_be_written_to_stops_the_run_before_its_first_step(tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write a checkpoint to \S*checkpoints \(.*\); free the disk, mend") as e:
        tiny.train(tmp_path / "run", checkpoints=str(tmp_path / place))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_look_at_the_start_leaves_nothing(tmp_path):
    with Checkpoints(tmp_path / "checkpoints"):
        assert list(Path(tmp_path / "checkpoints").iterdir()) == []
