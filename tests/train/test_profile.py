"""A trace of chosen steps: which steps are in it, what it costs the figures, and what is refused."""

import gzip
import json
import signal
from pathlib import Path

import pytest
import tiny

from efftrain.errors import ConfigError
from efftrain.train.loop import Training
from efftrain.train.profile import parse_steps
from efftrain.train.run import Run, read_metrics


def events(run: Path) -> list[dict]:
    """Of the one trace of a run, from the file that Perfetto reads."""
    (path,) = (run / "profile").rglob("*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def steps_in(trace: list[dict]) -> list[int]:
    return sorted(int(e["args"]["step_num"]) for e in trace if e.get("name") == "train" and "step_num" in e["args"])


def test_a_trace_holds_the_chosen_steps_and_no_others(tmp_path, capsys, ends_like):
    out = tmp_path / "run"
    fitted = tiny.train(out, profile="4:6")
    trace = events(out)
    assert steps_in(trace) == [4, 5, 6]
    assert sum(e.get("name") == "input_wait" for e in trace) == 3
    said = " ".join(capsys.readouterr().err.split())
    assert f"profile of steps 4 to 6: {out / 'profile'}; look at it with: pip install xprof" in said
    ends_like(out, fitted)  # tracing changes nothing that is computed


def test_starting_and_writing_a_trace_is_in_no_step_time(tmp_path):
    fitted = tiny.train(tmp_path / "run", profile="4:5", checkpoint_every=100)
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    assert fitted.figures["profile_s"] == pytest.approx(rows[4]["profile_s"] + rows[6]["profile_s"])
    # Steps 3 and 5 are waited for, so that nothing was dispatched behind them; with 1, 4, 6 and 8 they have no time.
    assert [step for step, row in rows.items() if "step_s" in row] == [2, 7]


def test_a_run_that_is_interrupted_within_the_trace_leaves_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tiny.train(tmp_path / "run", tiny.Walks(kill_self=(5, signal.SIGTERM)), profile="4:8")
    assert steps_in(events(tmp_path / "run")) == [4, 5]
    assert "profile of the steps until it ended" in " ".join(capsys.readouterr().err.split())


def test_a_continued_run_traces_what_is_left_of_the_steps(crashed, capsys):
    tiny.train(crashed, profile="5:7")  # continues behind step 6; and the field makes no other run
    assert steps_in(events(crashed)) == [7]
    Run(crashed, tiny.Config())


def test_steps_that_are_over_are_not_traced(crashed, capsys):
    tiny.train(crashed, profile="2:6")
    assert "no profile: this run continues behind step 6" in capsys.readouterr().err
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
