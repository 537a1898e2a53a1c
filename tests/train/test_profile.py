"""A trace of chosen steps: which steps are in it, what it costs the figures, and what is refused."""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from efftrain.errors import ConfigError
from efftrain.train.config import Training
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.metrics.profile import parse_steps
from efftrain.train.run.directory import load
from efftrain.train.run.identity import FIGURES


def events(run: Path) -> list[dict]:
    """Of the one trace of a run, from the file that Perfetto reads."""
    (path,) = (run / "profile").rglob("*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps_in(trace: list[dict]) -> list[int]:
    return sorted(int(e["args"]["step_num"]) for e in trace if e.get("name") == "train" and "step_num" in e["args"])


@pytest.fixture(scope="module")
def traced(crashed_run, tmp_path_factory) -> Path:
    """Runs that were traced, in a process of their own: a profiler that fails must not take other tests with it."""
    folder = tmp_path_factory.mktemp("traced")
    shutil.copytree(crashed_run, folder / "continued")
    script = Path(__file__).with_name("traced_runs.py")
    subprocess.run([sys.executable, script, folder], check=True, env=tiny.environment())
    return folder


def said(folder: Path, name: str) -> str:
    return " ".join((folder / f"{name}.txt").read_text().split())


def test_a_trace_holds_the_chosen_steps_and_no_others(traced, unbroken):
    out = traced / "whole"
    trace = events(out)
    assert steps_in(trace) == [4, 5, 6]
    assert sum(e.get("name") == "input_wait" for e in trace) == 3
    assert f"profile of steps 4 to 6: {out / 'profile'}; look at it with: pip install xprof" in said(traced, "whole")
    assert tiny.numbers(out) == tiny.numbers(unbroken[0])  # tracing changes nothing that is computed
    tiny.assert_same_parameters(load(out), unbroken[1].model)


def test_calls_of_python_functions_are_not_traced(traced):
    """Their tracer is what has crashed; it names events ``$file.py:line function``."""
    assert not [e["name"] for e in events(traced / "whole") if e.get("name", "").startswith("$")]


def test_starting_and_writing_a_trace_is_in_no_step_time(traced):
    rows = {row["step"]: row for row in read_metrics(traced / "times")}
    figures = json.loads((traced / "times" / FIGURES).read_text())
    assert figures["profile_s"] == pytest.approx(rows[4]["profile_s"] + rows[6]["profile_s"])
    # Steps 3 and 5 are waited for, so that nothing was dispatched after them; with 1, 4, 6 and 8 they have no time.
    assert [step for step, row in rows.items() if "step_s" in row] == [2, 7]


def test_a_run_that_is_interrupted_within_the_trace_leaves_one(traced):
    assert steps_in(events(traced / "interrupted")) == [4, 5]
    assert "profile of the steps until it ended" in said(traced, "interrupted")


def test_a_continued_run_traces_what_is_left_of_the_steps(traced):
    assert steps_in(events(traced / "continued")) == [7]


def test_steps_that_are_over_are_not_traced(crashed, capsys):
    tiny.train(crashed, profile="2:6")
    assert "no profile: this run continues after step 6" in capsys.readouterr().err
    assert not (crashed / "profile").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("15:10", "'15:10'; give the first step, from 1, then the last, such as 10:15"),
        ("0:3", "from 1"),
        ("10", "give the first and the last step, such as 10:15"),
        ("a:b", "give the first and the last step"),
        ("1:2:3", "give the first and the last step"),
        ("", "give the first and the last step"),
        ("15:21", "the run has 20 steps; end it at 20 or before"),
    ],
)
def test_what_is_not_two_steps_of_the_run_is_one_sentence(text, sentence):
    with pytest.raises(ConfigError, match=r"training\.profile is ") as caught:
        Training(steps=20, batch_size=8, length=8, profile=text)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_first_and_last_step_are_included():
    assert parse_steps("10:15", 20) == (10, 15)
    assert parse_steps("20:20", 20) == (20, 20)
