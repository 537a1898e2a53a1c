"""A run is saved before it is evaluated; a signal ends an evaluation, and the next process makes up for it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from efftrain.train.metrics.metrics_log import read_metrics

RECIPE = Path(__file__).with_name("evaluated_recipe.py")


def saved(out: Path) -> list[int]:
    folder = out / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir()) if folder.exists() else []


def validated(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out, "validation")]


def start(out: Path, step: int) -> subprocess.Popen:
    command = [sys.executable, str(RECIPE), str(out), str(step)]
    return subprocess.Popen(command, env=tiny.environment(), stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    tiny.train(out, evaluate=evaluate, eval_every=2)
    return out


def evaluate(model) -> dict[str, float]:
    return {"bpb": float(model.head.kernel[...].sum())}


def test_every_step_that_is_evaluated_and_saved_is_saved_first(tmp_path):
    """Also the last one: what fails in an evaluation costs no step, and the run is then evaluated without training."""
    out = tmp_path / "run"

    def fails_at_the_end(model) -> dict[str, float]:
        if len(read_metrics(out)) == 8:
            assert 8 in saved(out)
            raise tiny.Crash
        return evaluate(model)

    with pytest.raises(tiny.Crash):
        tiny.train(out, evaluate=fails_at_the_end, eval_every=4)
    assert (saved(out)[-1], validated(out)) == (8, [4])
    figures = json.loads((out / "training.json").read_text())
    assert figures["step_s_p50"] > 0
    fitted = tiny.train(out, tiny.Walks(crash_at=9), evaluate=evaluate, eval_every=4)
    assert validated(out) == [4, 8]
    assert fitted.evaluation["bpb"] == evaluate(fitted.model)["bpb"]
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 9))
    assert fitted.figures == figures  # of the process that trained


@pytest.mark.parametrize(("step", "number"), [(4, signal.SIGTERM), (6, signal.SIGINT), (8, signal.SIGTERM)])
def test_a_signal_within_an_evaluation_saves_that_step_at_once(tmp_path, whole, step, number):
    """Step 4 is evaluated and not saved, 6 both, 8 is the last. The evaluation that is ended would last for ever."""
    out = tmp_path / "run"
    process = start(out, step)
    while not (out / "evaluating").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert f"{number.name}: saved step {step}; the same command continues from there" in said
    assert [row["step"] for row in read_metrics(out)] == list(range(1, step + 1))
    assert saved(out)[-1] == step
    assert step not in validated(out)
    said = (again := start(out, 0)).communicate(timeout=60)[1]
    assert again.returncode == 0, said
    assert read_metrics(out, "validation") == read_metrics(whole, "validation")
    assert tiny.numbers(out) == tiny.numbers(whole)


def test_a_signal_before_an_evaluation_goes_before_it(tmp_path):
    def not_now(model):
        pytest.fail("evaluated")

    with pytest.raises(SystemExit):
        tiny.train(tmp_path / "run", tiny.Walks(kill_self=(4, signal.SIGTERM)), evaluate=not_now, eval_every=4)
    assert saved(tmp_path / "run")[-1] == 4


def test_a_signal_that_an_evaluation_swallows_still_ends_the_run_after_it(tmp_path):
    def swallows(model):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except BaseException:
            return {"bpb": 1.0}

    with pytest.raises(SystemExit) as caught:
        tiny.train(tmp_path / "run", evaluate=swallows, eval_every=4)
    assert caught.value.code == 75
    assert (saved(tmp_path / "run")[-1], validated(tmp_path / "run")) == (4, [4])
