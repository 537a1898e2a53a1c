"""One command at a time trains a run; whoever reads it does not mind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from killable_recipe import STEPS
from lock_holder import Holder
from test_run import hashes

from efftrain.errors import InUseError
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import Run, load

RECIPE = Path(__file__).with_name("killable_recipe.py")


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, str(RECIPE), str(out)]
    return subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.PIPE, text=True)


def test_of_two_processes_on_one_run_the_second_is_refused_and_the_first_is_not_disturbed(tmp_path):
    out = tmp_path / "run"
    first = start(out)
    while first.poll() is None and not (out / "metrics.jsonl").exists():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the second has come so far
    second = start(out)
    said = second.communicate(timeout=60)[1]
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2, said
    (sentence,) = [line for line in said.splitlines() if "error: " in line]
    assert f"{out} is in use by process {first.pid} on " in sentence
    assert "wait for it or choose another --out" in sentence
    said = first.communicate(timeout=60)[1]
    assert first.returncode == 0, said
    assert [row["step"] for row in read_metrics(out)] == list(range(1, STEPS + 1))
    assert not list(out.glob("*.lock"))
    assert load(out)


def test_a_run_in_use_is_refused_unchanged_and_read_meanwhile(crashed, ends_like):
    holder = Holder(crashed / ".lock", crashed)
    before = hashes(crashed)
    with pytest.raises(InUseError, match=f"is in use by process {holder.pid} "):
        tiny.train(crashed)
    assert hashes(crashed) == before
    assert load(crashed)
    holder.kill()
    ends_like(crashed, tiny.train(crashed))


def test_a_lock_that_a_kill_left_in_a_new_directory_is_no_obstacle(tmp_path):
    Holder(tmp_path / "run" / ".lock", tmp_path / "run").kill()
    with Run(tmp_path / "run", tiny.Config()):
        assert (tmp_path / "run" / ".lock").exists()
    assert not (tmp_path / "run" / ".lock").exists()
