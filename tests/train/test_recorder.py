"""Metrics, their order and their files; times with a clock that the test moves."""

import json
import struct
import time

import jax
import numpy as np
import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event

from efftrain.errors import RunError
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.metrics import timing as timing_module
from efftrain.train.metrics.metric_logger import MetricLogger
from efftrain.train.metrics.metrics_log import MetricsLog, read_metrics
from efftrain.train.metrics.timing import Timing
from efftrain.train.run.directory import Run


class OnDevice:
    """A scalar whose reading is noted, as that of an array on a device would be waited for."""

    def __init__(self, name: str, value: float, reads: list[str]):
        self._name, self._value, self._reads = name, value, reads

    def __array__(self, dtype=None, copy=None):
        self._reads.append(self._name)
        return np.asarray(self._value, dtype)


def metrics_of(number: int, reads: list[str], **values: float) -> dict:
    values = {"loss": float(number), "skipped": 0, "bad_steps": 0} | values
    return {name: (OnDevice(f"{name} {number}", value, reads), 1) for name, value in values.items()}


def recorder(run: Run, *, max_bad_steps: int = 3) -> MetricLogger:
    return MetricLogger(run, Timing(64, None, None), start=0, steps=9, max_bad_steps=max_bad_steps)


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", {"a": 1})


def test_metrics_are_read_one_step_late(run):
    reads: list[str] = []
    with recorder(run) as log:
        log.push(1, metrics_of(1, reads))
        assert reads == []
        log.push(2, metrics_of(2, reads))
        assert reads
        assert all(name.endswith(" 1") for name in reads)
        log.flush()
    assert any(name.endswith(" 2") for name in reads)
    assert [(row["step"], row["loss"]) for row in read_metrics(run.path)] == [(1, 1.0), (2, 2.0)]


def test_reading_metrics_starts_nothing_on_the_device(run):
    """Anything computed on the device to write a row would wait there behind the step that was just dispatched."""
    reads: list[str] = []
    with recorder(run) as log:
        log.push(1, metrics_of(1, reads))
        with jax.transfer_guard_host_to_device("disallow"):
            with pytest.raises(Exception, match="Disallowed"):
                jax.numpy.minimum(1.0, 0.5)  # the trap works
            log.push(2, metrics_of(2, reads))
    assert len(read_metrics(run.path)) == 1


def test_a_figure_that_is_an_array_becomes_a_list(run):
    with recorder(run) as log:
        loads = np.array([[1.25, 0.75], [2.0, 1 / 3]])
        log.push(1, metrics_of(1, []) | {"moe/loads/0": (loads, 1)})
        log.flush()
    assert read_metrics(run.path)[0]["moe/loads/0"] == [[1.25, 0.75], [2.0, 0.333]]


def test_collapsed_experts_are_warned_of_once_with_a_remedy(run, capsys):
    with recorder(run) as log:
        for number, share in enumerate((0.0, 0.0, 0.125, 0.25), start=1):
            log.push(number, metrics_of(number, [], **{"moe/collapsed": share}))
        log.flush()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning") == 1
    assert "warning: step 3: experts have had less than 1% of the mean load for 500 steps" in said
    assert "raise moe.bias_rate" in said


def test_so_many_bad_steps_in_a_row_end_the_run(run):
    with recorder(run) as log:
        for number, bad in enumerate((1, 2, 0, 1, 2), start=1):
            log.push(number, metrics_of(number, [], bad_steps=bad))
        log.push(6, metrics_of(6, [], bad_steps=3))
        with pytest.raises(RunError, match=r"3 steps in a row, up to step 6, .* lower optimizer\.peak_lr"):
            log.flush()
    assert len(read_metrics(run.path)) == 6


def test_every_row_is_json_that_others_can_read(run):
    with recorder(run) as log:
        log.push(1, metrics_of(1, [], loss=np.nan) | {"none": (np.float32(0), np.float32(0))})
        log.flush()

    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    row = json.loads((run.path / "metrics.jsonl").read_text(), parse_constant=refuse)
    times = [row.pop("input_wait_s"), row.pop("compute_s")]
    assert all(seconds >= 0 for seconds in times)
    assert row == {"step": 1, "split": "train", "loss": None, "skipped": 0.0, "none": None}


def test_a_restart_takes_back_rows_behind_the_checkpoint_and_half_a_row(tmp_path):
    log = MetricsLog(tmp_path, after_step=0)
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.write(2, {"bpb": 2.0}, split="validation")
    log.write(4, {"bpb": 4.0}, split="validation")
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "spl')  # killed while it wrote
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    log = MetricsLog(tmp_path, after_step=3)
    log.write(4, {"loss": 44.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 44.0)]
    assert [row["bpb"] for row in read_metrics(tmp_path, "validation")] == [2.0]
    assert len(path.read_text().splitlines()) == 5


def events_of(path) -> list[Event]:
    """A TFRecord file: length, checksum, event, checksum."""
    data, events = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_tensorboard_events_say_what_the_rows_say(tmp_path):
    log = MetricsLog(tmp_path, after_step=7)
    log.write(8, {"loss": 1.5, "lr": 0.25})
    log.write(8, {"bpb": 2.5}, split="validation")
    log.flush()  # what follows may be a kill
    (path,) = (tmp_path / "tensorboard").iterdir()
    version, start, *rest = events_of(path)
    log.close()
    assert path.name.startswith("events.out.tfevents.")
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (8, start.session_log.START)
    found = [(e.step, v.tag, v.simple_value) for e in rest for v in e.summary.value]
    assert found == [(8, "train/loss", 1.5), (8, "train/lr", 0.25), (8, "validation/bpb", 2.5)]


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(timing_module.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def wait(clock: Clock, times: Timing, seconds: float, phase: str = "input_wait") -> None:
    with times.phase(phase):
        clock.pass_(seconds)


def fail_within(clock: Clock, times: Timing) -> None:
    with times.phase("checkpoint"):
        clock.pass_(4.0)
        raise OSError


def test_times_and_rates_by_hand(monkeypatch):
    clock = Clock(monkeypatch)
    times = Timing(1000, flops_per_token=6.0, peak_flops=24_000.0)
    wait(clock, times, 77.0)  # for the first batch
    # The first step has no step before it, so that its time means nothing.
    assert times.step_arrived() == {"input_wait_s": 77.0, "compute_s": 0.0}
    wait(clock, times, 0.5)
    clock.pass_(1.5)
    step = times.step_arrived()
    assert step == {
        "tokens_per_s": 500.0,
        "mfu": 500 * 6 / 24_000,
        "step_s": 2.0,
        "input_wait_s": 0.5,
        "compute_s": 1.5,
    }
    for seconds in (1.0, 2.0, 2.0, 3.0):
        wait(clock, times, 0.25)
        clock.pass_(seconds - 0.25)
        times.step_arrived()
    times.interrupt()
    wait(clock, times, 1000.0, "evaluation")
    wait(clock, times, 9.0)
    assert times.step_arrived() == {"input_wait_s": 9.0, "compute_s": 0.0, "evaluation_s": 1000.0}
    wall_s = 77 + 2 + 8 + 1009
    assert times.figures() == {
        "tokens_per_s": 500.0,
        "mfu": 0.125,
        "step_s_p50": 2.0,
        "step_s_p95": pytest.approx(2.8),
        "input_wait_share": pytest.approx(1.5 / 10),
        "input_wait_s": 77 + 0.5 + 4 * 0.25 + 9,
        "compute_s": 1.5 + 7,
        "evaluation_s": 1000.0,
        "wall_s": wall_s,
        "evaluation_share": 1000 / wall_s,
        "checkpoint_share": 0.0,
    }


def test_a_phase_within_a_phase_counts_once(monkeypatch):
    clock = Clock(monkeypatch)
    times = Timing(10, None, None)
    with times.phase("evaluation"):
        clock.pass_(2.0)
        wait(clock, times, 3.0)
        with pytest.raises(OSError):
            fail_within(clock, times)
        clock.pass_(5.0)
    clock.pass_(6.0)
    split = {"evaluation_s": 7.0, "input_wait_s": 3.0, "checkpoint_s": 4.0, "compute_s": 6.0}
    assert times.figures().items() >= (split | {"wall_s": 20.0}).items()
    assert times.step_arrived() == split


def test_what_is_not_known_is_left_out(monkeypatch):
    clock = Clock(monkeypatch)
    times = Timing(10, flops_per_token=6.0, peak_flops=None)
    assert not {"tokens_per_s", "step_s_p50", "input_wait_share"} & times.figures().keys()
    times.step_arrived()
    clock.pass_(1.0)
    assert times.step_arrived().keys() == {"tokens_per_s", "step_s", "input_wait_s", "compute_s"}
    assert "mfu" not in times.figures()


def test_a_wait_belongs_to_the_time_in_which_it_was(run, monkeypatch):
    """Loop: wait for batch n, dispatch n, read n - 1. Steps take no time here, so that every time is all waiting."""
    clock = Clock(monkeypatch)
    with recorder(run) as log:
        for number, wait_s in enumerate((5.0, 1.0, 3.0, 2.0), start=1):
            with log.phase("input_wait"):
                clock.pass_(wait_s)
            log.push(number, metrics_of(number, []))
        log.flush()
    rows = read_metrics(run.path)
    assert [(row.get("step_s"), row["input_wait_s"], row["compute_s"]) for row in rows] == [
        (None, 6.0, 0.0),
        (3.0, 3.0, 0.0),
        (2.0, 2.0, 0.0),
        (None, 0.0, 0.0),
    ]


def test_the_phases_of_a_run_add_up_to_its_wall_time(tmp_path, monkeypatch):
    """Against clocks around the slow parts themselves, and around the whole run."""
    spent = {"input_wait_s": 0.0, "checkpoint_s": 0.0, "evaluation_s": 0.0}

    def slow(name, seconds, function):
        def call(*arguments):
            before = time.perf_counter()
            time.sleep(seconds)
            result = function(*arguments)
            spent[name] += time.perf_counter() - before
            return result

        return call

    class SlowWalks(tiny.Walks):
        __next__ = slow("input_wait_s", 0.05, tiny.Walks.__next__)

    monkeypatch.setattr(Checkpoints, "save", slow("checkpoint_s", 0.2, Checkpoints.save))
    before = time.perf_counter()
    figures = tiny.train(
        tmp_path / "run", SlowWalks(), eval_every=4, evaluate=slow("evaluation_s", 0.1, lambda model: {"bpb": 1.0})
    ).figures
    around = time.perf_counter() - before
    parts = ("input_wait_s", "compute_s", "compile_s", "evaluation_s", "checkpoint_s")
    assert figures["wall_s"] == pytest.approx(sum(figures[name] for name in parts))
    assert figures["wall_s"] < around
    assert spent["checkpoint_s"] >= 3 * 0.2
    for name, seconds in spent.items():
        assert seconds <= figures[name] + 1e-6  # the phase holds the slow call, and little else
    assert figures["checkpoint_share"] == pytest.approx(figures["checkpoint_s"] / figures["wall_s"])
    # The rows say the same but for what follows the last one: an evaluation and a checkpoint.
    rows = read_metrics(tmp_path / "run")
    in_rows = {name: sum(row.get(name, 0.0) for row in rows) for name in parts}
    assert in_rows["compile_s"] == pytest.approx(figures["compile_s"])
    assert in_rows["input_wait_s"] == pytest.approx(figures["input_wait_s"])
    assert in_rows["compute_s"] == pytest.approx(figures["compute_s"], abs=0.03 * figures["wall_s"])
    assert 0.1 <= in_rows["evaluation_s"] < figures["evaluation_s"]
    assert [row["step"] for row in rows if "checkpoint_s" in row] == [4, 7]
    assert [row["step"] for row in rows if "evaluation_s" in row] == [5]
