"""A run that is stopped at any moment, and continued, is the run that was not stopped: bit for bit."""

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from killable_recipe import STEPS

from efftrain.errors import RunError
from efftrain.train import loop
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import load
from efftrain.train.supervision.interruption import Interruption

RECIPE = Path(__file__).with_name("killable_recipe.py")


def start(out: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(RECIPE), str(out)], env=tiny.environment(), stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    said = process.communicate(timeout=240)[1]
    return process.returncode, said


def wait_until(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    while not condition() and process.poll() is None:
        time.sleep(0.0005)


def n_rows(out: Path) -> int:
    return len(read_metrics(out)) if (out / "metrics.jsonl").exists() else 0


def is_saving(out: Path) -> bool:
    checkpoints = out / "checkpoints"
    return checkpoints.exists() and any("tmp" in p.name for p in checkpoints.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    code, said = finish(start(out))
    assert code == 0, said
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    assert tiny.numbers(out) == tiny.numbers(whole)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    assert read_metrics(out, "validation") == read_metrics(whole, "validation")
    tiny.assert_same_parameters(load(out), load(whole))


def test_a_run_killed_at_any_moment_and_restarted_is_the_same_run(whole, tmp_path):
    """SIGKILL: before the first step, between steps, and within saves until one really left a half-written one."""
    out, draw = tmp_path / "run", random.Random(0)
    moments = ["start", "save", "step", "save", "step"]
    half_saves = kills = 0
    while moments:
        moment = moments.pop(0)
        rows, process = n_rows(out), start(out)
        if moment == "start":
            wait_until(lambda: (out / "config.json").exists(), process)
            time.sleep(draw.uniform(0, 0.5))
        elif moment == "step":
            wait_until(lambda rows=rows: n_rows(out) > rows, process)
            time.sleep(draw.uniform(0, 0.1))
        else:
            wait_until(lambda: n_rows(out) > 0, process)
            wait_until(lambda: is_saving(out), process)
        process.send_signal(signal.SIGKILL)
        code, said = finish(process)
        assert code in (-signal.SIGKILL, 0), said
        kills += code != 0
        half_saves += is_saving(out)
        if moment == "save" and not moments and not half_saves and kills < 10:
            moments.append("save")
    assert kills >= 4
    assert half_saves
    code, said = finish(start(out))
    assert code == 0, said
    assert_same_run(out, whole)
    assert not is_saving(out)


def test_sigterm_saves_the_step_and_ends_with_code_75(whole, tmp_path):
    out = tmp_path / "run"
    process = start(out)
    wait_until(lambda: n_rows(out) >= 5, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 75
    step = n_rows(out)
    assert 5 <= step < STEPS
    assert f"SIGTERM: saved step {step}; the same command continues from there" in said
    assert max(int(p.name) for p in (out / "checkpoints").iterdir()) == step
    code, said = finish(start(out))
    assert code == 0, said
    assert f"continuing from step {step}" in said
    assert_same_run(out, whole)


def test_ctrl_c_saves_the_step_too(tmp_path, capsys, ends_like):
    before = signal.getsignal(signal.SIGINT)  # a background job of a shell ignores it
    with pytest.raises(SystemExit) as caught:
        tiny.train(tmp_path / "run", tiny.Walks(kill_self=(5, signal.SIGINT)))
    assert caught.value.code == 75
    assert "SIGINT: saved step 5" in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    ends_like(tmp_path / "run", tiny.train(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(tiny.Walks):
        def __next__(self):
            if self.taken == 1:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().__next__()

    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "run", Impatient())


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path, ends_like):
    fitted = tiny.train(tmp_path / "run", tiny.Walks(kill_self=(8, signal.SIGTERM)))
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))
    ends_like(tmp_path / "run", fitted)


def test_a_signal_between_two_lines_of_the_loop_loses_no_row(tmp_path, monkeypatch, ends_like):
    """Each look at ``asked`` is a line of the loop: whichever sees the signal first, all of a saved step is written."""

    class Later(Interruption):
        looks = 0

        @property
        def asked(self):
            self.looks += 1
            return "SIGTERM" if self.looks > 4 else None

        @asked.setter
        def asked(self, value):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Interruption", Later)
        with pytest.raises(SystemExit):
            tiny.train(tmp_path / "run")
    (newest,) = [step for p in (tmp_path / "run" / "checkpoints").iterdir() if (step := int(p.name)) != 3]
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, newest + 1))
    ends_like(tmp_path / "run", tiny.train(tmp_path / "run"))


def test_a_crash_is_continued_from_the_newest_checkpoint(crashed, ends_like, capsys):
    fitted = tiny.train(crashed)
    assert "continuing from step 6" in capsys.readouterr().err
    ends_like(crashed, fitted)
    figures = json.loads((crashed / "training.json").read_text())
    assert figures == fitted.figures


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_one_sentence_and_the_run_continues(crashed, ends_like):
    """No file may grow beyond 8 kB: what a full disk says, without filling one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    shutil.rmtree(crashed / "tensorboard")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, before[1]))
    try:
        with pytest.raises(
            RunError, match=r"cannot write a checkpoint to \S+checkpoints \(.*\); free disk space"
        ) as caught:
            tiny.train(crashed)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    ends_like(crashed, tiny.train(crashed))
