"""Where checkpoints are, and which of them stay."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from lock_holder import Holder

from efftrain.errors import ConfigError, InUseError, RunError
from efftrain.lock import beside
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.run.directory import Run, load


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
    with pytest.raises(
        RunError, match=r"cannot write a checkpoint to \S*checkpoints \(.*\); free disk space, correct"
    ) as e:
        tiny.train(tmp_path / "run", checkpoints=str(tmp_path / place))
    assert "\n" not in str(e.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_look_at_the_start_leaves_nothing(tmp_path):
    with Checkpoints(tmp_path / "checkpoints"):
        assert list(Path(tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("how", ["moved", "deleted"])
def test_a_folder_that_vanishes_during_the_run_is_told_and_the_next_checkpoint_is_complete(
    tmp_path, unbroken, capfd, how
):
    out, away = tmp_path / "run", tmp_path / "away"

    class Vanishes(tiny.Walks):
        def __next__(self):
            if self.taken == 5:  # of the steps 3, 6 and 8 that are saved, the first is
                wait_for(out / "checkpoints" / "3")
                (out / "checkpoints").rename(away)
                if how == "deleted":
                    shutil.rmtree(away)
            return super().__next__()

    with pytest.raises(tiny.Crash):
        tiny.train(out, Vanishes(crash_at=8))
    said = " ".join(capfd.readouterr().err.split())
    assert f"warning: {out}/checkpoints with checkpoints 3 was moved or deleted while the run goes on" in said
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["6"]
    assert not away.exists() or [p.name for p in away.iterdir()] == ["3"]
    fitted = tiny.train(out)
    assert "continuing from step 6" in capfd.readouterr().err
    assert tiny.numbers(out) == tiny.numbers(unbroken[0])
    tiny.assert_same_parameters(fitted.model, unbroken[1].model)


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not come")


def test_a_folder_that_vanishes_before_its_first_checkpoint_is_told(tmp_path, capfd):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints._manager._maybe_await_cleanup_tmp_directory()  # a thread that reads the folder, for milliseconds
        (tmp_path / "checkpoints").rmdir()
        checkpoints.save(1, {"x": np.ones(3)}, None, None)
        checkpoints.wait()
        assert f"warning: {tmp_path}/checkpoints was moved or deleted" in " ".join(capfd.readouterr().err.split())
        checkpoints.save(2, {"x": np.ones(3)}, None, None)
        checkpoints.wait()
    assert not capfd.readouterr().err  # once


def test_a_checkpoint_that_vanishes_at_once_is_not_called_saved(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, {"x": np.ones(3)}, None, None)
        checkpoints._manager.wait_until_finished()
        (tmp_path / "checkpoints").rename(tmp_path / "away")
        with pytest.raises(
            RunError, match=r"checkpoint \S+/1 was moved or deleted as soon as it was written; put it back"
        ):
            checkpoints.wait()


def test_rows_whose_checkpoints_were_moved_between_two_starts_are_kept(crashed, ends_like, capfd):
    rows = (crashed / "metrics.jsonl").read_bytes()
    (crashed / "checkpoints").rename(crashed / "away")
    fitted = tiny.train(crashed, checkpoint_every=2)
    said = " ".join(capfd.readouterr().err.split())
    assert "goes on from step 0, as there is no newer checkpoint; if they were moved, end this process" in said
    assert (crashed / "metrics.jsonl.before-1").read_bytes() == rows
    ends_like(crashed, fitted)


def test_two_runs_cannot_write_to_one_folder_of_checkpoints(tmp_path):
    holder = Holder(beside(tmp_path / "shared"), tmp_path / "shared")
    words = rf"shared is in use by process {holder.pid} on \S+; wait for it or choose another --training.checkpoints"
    with pytest.raises(InUseError, match=words):
        tiny.train(tmp_path / "run", checkpoints=str(tmp_path / "shared"), steps=1)
    Checkpoints(tmp_path / "shared", read_only=True)  # whoever reads does not mind
    holder.kill()
    tiny.train(tmp_path / "run", checkpoints=str(tmp_path / "shared"), steps=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "shared"]
