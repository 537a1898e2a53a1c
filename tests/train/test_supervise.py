"""``efftrain train``: real processes that crash, are killed, are told to stop, and are started again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from efftrain.errors import ConfigError
from efftrain.train.loop import TrainResult
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import load
from efftrain.train.supervision.supervise import supervise

RECIPE = Path(__file__).with_name("supervised_recipe.py")
STEPS = tiny.TRAINING.steps
CALL = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it, and passes that on
from efftrain.train.supervision.supervise import supervise
raise SystemExit(supervise(sys.argv[2:], max_restarts=int(sys.argv[1]), first_pause_s=0.01))
"""


class Supervised:
    """A supervisor over the tiny recipe with a plan."""

    def __init__(self, folder: Path, plan: str, *, max_restarts: int):
        self.out, self.folder = folder / "run", folder
        recipe = [sys.executable, str(RECIPE), str(self.out), str(folder), plan, str(STEPS)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CALL, str(max_restarts), *recipe],
            env=tiny.environment(),
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def starts(self) -> int:
        return len(list(self.folder.glob("start-*")))

    def child(self) -> int:
        return int((self.folder / f"start-{self.starts - 1}").read_text())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 120
        while not condition() and self.process.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.01)

    def finish(self) -> tuple[int, str]:
        said = self.process.communicate(timeout=240)[1]
        return self.process.returncode, said


def test_crash_kill_and_preemption_are_survived_and_the_run_is_the_same(tmp_path, ends_like):
    """An exception, SIGKILL (where the newest checkpoint may be half-written), and SIGTERM to the process itself."""
    run = Supervised(tmp_path, "raise:5,kill:8,term:7,done", max_restarts=2)
    code, said = run.finish()
    assert code == 0, said
    assert run.starts == 4
    for before, sentence in [
        ("Crash", "the recipe ended with code 1; starting it again"),
        ("continuing from step 3", "the recipe ended with code 137; starting it again"),
        ("code 137; starting it again", "SIGTERM: saved step 7"),
        ("SIGTERM: saved step 7", "the recipe ended with code 75; starting it again"),
        ("code 75", "continuing from step 7"),
    ]:
        assert sentence in said.partition(before)[2], said
    assert "(restart 1 of 2 since step 3)" in said
    assert "(restart 1 of 2 since step 7)" in said
    assert [row["step"] for row in read_metrics(run.out)] == list(range(1, STEPS + 1))
    ends_like(run.out, TrainResult(model=load(run.out), figures={}, evaluation=None))


def test_it_gives_up_where_restarts_bring_no_newer_checkpoint(tmp_path):
    """The second start comes behind step 3, which is progress; the ones behind it crash at the same place."""
    run = Supervised(tmp_path, "raise:5", max_restarts=2)
    code, said = run.finish()
    assert code == 1
    assert run.starts == 1 + 1 + 2
    assert "and 2 restarts in a row brought no checkpoint after step 3; correct the error in its last lines" in said
    assert [text for text in ("restart 1 of 2", "restart 2 of 2", "restart 3") if text in said] == [
        "restart 1 of 2",
        "restart 2 of 2",
    ]


def test_a_crash_before_the_first_step_is_no_progress(tmp_path):
    run = Supervised(tmp_path, "crash", max_restarts=1)
    code, said = run.finish()
    assert (code, run.starts) == (1, 2)
    assert said.count("RuntimeError: before the first step") == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_a_signal_is_passed_on_and_is_the_end(tmp_path, number, code):
    """Ctrl-C in a terminal, or the end of a machine: the recipe saves, and is not started again."""
    run = Supervised(tmp_path, "wait:5,done", max_restarts=3)
    run.wait_until((tmp_path / "ready").exists)
    run.process.send_signal(number)
    time.sleep(0.2)  # it is only noted while the batch does not come
    (tmp_path / "go").touch()
    got, said = run.finish()
    assert (got, run.starts) == (code, 1), said
    assert f"{signal.Signals(number).name}: saved step 5" in said


def test_a_second_ctrl_c_ends_the_recipe_at_once(tmp_path):
    run = Supervised(tmp_path, "wait:5,done", max_restarts=3)
    run.wait_until((tmp_path / "ready").exists)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    run.process.send_signal(signal.SIGINT)
    code, said = run.finish()
    assert (code, run.starts) == (128 + signal.SIGINT, 1), said


def test_a_signal_in_the_pause_ends_it(tmp_path):
    call = CALL.replace("0.01", "3600")
    process = subprocess.Popen(
        [sys.executable, "-c", call, "3", sys.executable, "-c", "raise SystemExit(9)"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "starting it again in 300 s" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 9


@pytest.mark.parametrize("code", [0, 2])
def test_success_and_a_mistake_are_not_repeated(tmp_path, code):
    run = Supervised(tmp_path, f"code:{code}", max_restarts=5)
    assert run.finish()[0] == code
    assert run.starts == 1


def test_pauses_grow(monkeypatch, capsys):
    from efftrain.train.supervision import supervise as module

    pauses = []
    monkeypatch.setattr(module._Child, "pause", lambda self, seconds: pauses.append(seconds))
    assert supervise([sys.executable, "-c", "raise SystemExit(3)"], max_restarts=10) == 3
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


def test_what_a_killed_recipe_left_behind_is_ended(tmp_path):
    """A worker of the loader, say, that would keep memory and files."""
    program = (
        "import os, subprocess, sys; worker = subprocess.Popen(['sleep', '3600']);"
        f"open({str(tmp_path / 'worker')!r}, 'w').write(str(worker.pid)); os.kill(os.getpid(), 9)"
    )
    assert supervise([sys.executable, "-c", program], max_restarts=0) == 137
    worker = int((tmp_path / "worker").read_text())
    end = time.monotonic() + 60
    while _is_alive(worker):
        assert time.monotonic() < end
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_negative_number_of_restarts_is_refused():
    with pytest.raises(ConfigError, match=r"--max-restarts is -1; give 0 or more"):
        supervise(["true"], max_restarts=-1)


def efftrain(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "efftrain.cli", "train", *arguments], capture_output=True, text=True, check=False
    )


def test_the_command_gives_the_recipe_its_arguments_and_keeps_its_own(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import sys\nprint(sys.argv[1:])\nraise SystemExit(len(sys.argv) == 9)")
    done = efftrain("--max-restarts", "1", str(recipe), "cpu", "--out", "a b", "--training.steps", "3", "--help")
    assert (done.returncode, done.stdout) == (0, "['cpu', '--out', 'a b', '--training.steps', '3', '--help']\n")
    done = efftrain(str(recipe), "cpu", "--a=1", "--max-restarts=1", "--b", "2", "c", "d", "e", "f")
    assert done.returncode == 1
    assert done.stdout == 2 * "['cpu', '--a=1', '--b', '2', 'c', 'd', 'e', 'f']\n"  # started again once


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.py", "cpu"], "there is no script nowhere.py"),
        ([], "required"),
        (["--nonsense", "RECIPE"], "recipe"),
        (["RECIPE", "cpu", "--max-restarts", "many"], "max-restarts"),
        (["RECIPE", "cpu", "--max-restarts", "-2"], "--max-restarts is -2; give 0 or more"),
    ],
)
def test_a_mistake_of_the_command_is_code_2(arguments, sentence):
    done = efftrain(*(str(RECIPE) if word == "RECIPE" else word for word in arguments))
    assert done.returncode == 2, done
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_help_says_whose_arguments_are_whose():
    done = efftrain("--help")
    assert done.returncode == 0
    assert "--max-restarts" in done.stdout
    assert os.linesep in done.stdout
