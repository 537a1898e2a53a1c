"""A hang is noticed, described and, where asked, ended; a phase that may be slow is not a hang."""

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from efftrain.errors import ConfigError
from efftrain.sharding import hosts
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.metrics.timing import Timing, WatchdogStatus
from efftrain.train.supervision.supervise import PROGRESS_FILE
from efftrain.train.supervision.watchdog import EXIT_HUNG, Watchdog

QUICK = Watchdog(factor=1.5, min_s=1.0)
PATIENCE_S = 120.0  # a bound for what should happen within a second


def wait_for(path: Path, phase: str = "") -> None:
    """Until the file holds stacks of this phase (any, by default)."""
    end = time.monotonic() + PATIENCE_S
    while not (path.exists() and "most recent call first" in path.read_text().partition(f"in {phase}")[2]):
        assert time.monotonic() < end, f"there is no {path}"
        time.sleep(0.01)


class Stuck(tiny.Walks):
    """The fifth batch comes only when somebody has noticed that it does not."""

    def __init__(self, stacks: Path):
        super().__init__()
        self._stacks = stacks

    def __next__(self):
        if self.taken == 4:
            self.wait_for_somebody()
        return super().__next__()

    def wait_for_somebody(self):
        wait_for(self._stacks)


def test_a_hung_step_leaves_the_stacks_of_all_threads_and_goes_on_when_it_can(tmp_path, capfd, ends_like):
    out = tmp_path / "run"
    stacks = out / "stacks-0.txt"
    other = threading.Event()
    thread = threading.Thread(target=other.wait)
    thread.start()
    fitted = tiny.train(out, Stuck(stacks), watchdog=QUICK)
    other.set()
    thread.join()
    text = stacks.read_text()
    assert text.count("in input_wait for") == 1  # said once, however long it lasts
    assert "in wait_for_somebody" in text
    assert text.count("Thread 0x") >= 3  # the loop, the thread above, the watchdog
    said = capfd.readouterr().err
    sentence = (
        r"error: process 0 hangs in input_wait: no step for \d+ s, where the timeout is 1 s \(--training\.watchdog\)"
    )
    assert re.search(rf"{sentence}; what each thread was doing is in {re.escape(str(stacks))}; waiting on; .*\n", said)
    ends_like(out, fitted)


def test_a_slow_evaluation_or_checkpoint_is_no_hang_within_its_own_limit(tmp_path, capfd):
    def evaluate(model):
        time.sleep(2.2)
        return {"bpb": 1.0}

    tiny.train(tmp_path / "run", eval_every=4, evaluate=evaluate, watchdog=QUICK)
    assert not (tmp_path / "run" / "stacks-0.txt").exists()
    assert "hangs" not in capfd.readouterr().err


def test_an_evaluation_beyond_its_limit_is_a_hang(tmp_path):
    def evaluate(model):
        wait_for(tmp_path / "run" / "stacks-0.txt", "evaluation")  # compiling may have reached the limit before
        return {"bpb": 1.0}

    tiny.train(tmp_path / "run", evaluate=evaluate, watchdog=Watchdog(min_s=0.1, aside_s=1.0))
    assert "in evaluation for" in (tmp_path / "run" / "stacks-0.txt").read_text()


def test_none_watches_nothing(tmp_path):
    before = threading.active_count()
    with Watchdog(factor=None).watch(Timing(1, None, None), tmp_path):
        assert threading.active_count() == before
    with Watchdog().watch(Timing(1, None, None), tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_limits_by_hand():
    watchdog = Watchdog(factor=20, min_s=300, aside_s=7200)
    assert watchdog.timeout_s(WatchdogStatus("compute", 0, median_s=1)) == 300
    assert watchdog.timeout_s(WatchdogStatus("compute", 0, median_s=30)) == 600
    assert watchdog.timeout_s(WatchdogStatus("input_wait", 0, median_s=30)) == 600
    assert watchdog.timeout_s(WatchdogStatus("compute", 0, median_s=None)) == 7200  # the first steps
    assert watchdog.timeout_s(WatchdogStatus("checkpoint", 0, median_s=1)) == 7200


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"factor": 1.0}, "watchdog.factor is 1.0"), ({"min_s": 0}, "watchdog.min_s is 0"), ({"aside_s": -1}, "aside_s")],
)
def test_impossible_limits_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Watchdog(**changes)


HANG = """
import sys, time
from pathlib import Path
import tiny
from efftrain.train.supervision.watchdog import Watchdog

class Hang(tiny.Walks):
    def __next__(self):
        if self.taken == 4:
            time.sleep(3600)
        return super().__next__()

tiny.train(Path(sys.argv[1]), Hang(), watchdog=Watchdog(factor=1.5, min_s=1.0, end={end}))
"""


@pytest.mark.parametrize(("end", "supervised"), [(True, False), (None, True)])
def test_a_hung_process_is_ended_with_its_own_code_and_continues(tmp_path, end, supervised, ends_like):
    """By the field, or because a supervisor is there."""
    out = tmp_path / "run"
    environment = tiny.environment() | ({PROGRESS_FILE: str(tmp_path / "progress")} if supervised else {})
    done = subprocess.run(
        [sys.executable, "-c", HANG.format(end=end), str(out)],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == EXIT_HUNG, done.stderr
    assert f"ending with code {EXIT_HUNG}" in done.stderr
    assert "in __next__" in (out / "stacks-0.txt").read_text()
    assert [row["step"] for row in read_metrics(out)] == [1, 2, 3]
    if supervised:
        assert (tmp_path / "progress").read_text() == "0"
    ends_like(out, tiny.train(out))


def test_each_process_writes_its_own_dump(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "process_index", lambda: 3)
    with Watchdog(factor=2, min_s=0.05, aside_s=0.1).watch(Timing(1, None, None), tmp_path / "run"):
        wait_for(tmp_path / "run" / "stacks-3.txt")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["stacks-3.txt"]
