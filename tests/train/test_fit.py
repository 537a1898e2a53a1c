"""``fit`` from outside: what a run leaves, what it refuses, and what it does when a step is bad."""

import dataclasses
import math
import shutil

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from test_run import hashes

from efftrain.errors import ConfigError, RunError
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.metrics.metrics_log import MetricsLog, read_metrics
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.optimizers import AdamW
from efftrain.train.run.directory import load


@pytest.mark.smoke
def test_metrics_have_a_row_for_each_step_in_order(unbroken):
    rows = read_metrics(unbroken[0])
    assert [row["step"] for row in rows] == list(range(1, 9))
    factor = tiny.TRAINING.schedule.build(8)
    for row in rows:
        assert row.keys() >= {"loss", "grad_norm", "skipped", "lr"}
        assert row["lr"] == pytest.approx(1e-2 * float(factor(row["step"] - 1)), rel=1e-6)
        assert row["skipped"] == 0
        assert ("step_s" in row) == (row["step"] in (2, 5))  # not the first one, nor those around a checkpoint
    assert rows[0]["loss"] == pytest.approx(math.log(tiny.VOCAB), abs=0.5)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_a_row_is_written_after_the_next_step_was_dispatched(tmp_path, monkeypatch):
    events = []

    class Noted(tiny.Walks):
        def __next__(self):
            events.append(f"batch {self.taken + 1}")
            return super().__next__()

    write = MetricsLog.write

    def noted(self, step, values, **kwargs):
        events.append(f"row {step}")
        write(self, step, values, **kwargs)

    monkeypatch.setattr(MetricsLog, "write", noted)
    tiny.train(tmp_path / "run", Noted(), steps=4, checkpoint_every=100)
    assert events == ["batch 1", "batch 2", "row 1", "batch 3", "row 2", "batch 4", "row 3", "row 4"]


def test_the_step_is_traced_once_and_never_again(tmp_path):
    traced = []

    def counted(model, batch, key):
        traced.append(1)
        return next_token_loss(model, batch, key)

    tiny.train(tmp_path / "run", objective=counted)
    assert len(traced) == 1


@pytest.mark.smoke
def test_figures_are_kept_and_a_finished_run_does_nothing(unbroken, tmp_path, capsys):
    out, fitted = unbroken
    assert fitted.figures.keys() >= {"compile_s", "program_bytes", "tokens_per_s", "step_s_p50", "step_s_p95"}
    assert 0 <= fitted.figures["input_wait_share"] <= 1
    copy = shutil.copytree(out, tmp_path / "run")
    before = hashes(copy)
    again = tiny.train(copy, tiny.Walks(crash_at=1))
    assert "is trained already (8 steps); nothing to do" in capsys.readouterr().err
    assert again.figures == fitted.figures
    tiny.assert_same_parameters(again.model, fitted.model)
    assert {name for name, h in hashes(copy).items() if before.get(name) != h} <= {"environment.json"}


def test_evaluations_have_rows_of_their_own(tmp_path):
    seen = []

    def evaluate(model):
        seen.append(np.asarray(model.head.kernel[...]).sum())
        return {"bpb": float(len(seen))}

    tiny.train(tmp_path / "run", steps=5, eval_every=2, evaluate=evaluate)
    rows = read_metrics(tmp_path / "run", "validation")
    assert rows == [{"step": s, "split": "validation", "bpb": b} for s, b in ((2, 1.0), (4, 2.0), (5, 3.0))]
    assert len(set(seen)) == 3


@pytest.fixture(scope="module")
def spoiled_run(tmp_path_factory):
    """Three bad steps in a row from step 5, with a limit of three; one and two before, which are forgiven."""
    out = tmp_path_factory.mktemp("spoiled") / "run"
    with pytest.raises(RunError) as caught:
        tiny.train(
            out, tiny.Walks(spoil=(1, 3, 5, 6, 7)), objective=tiny.nan_at_spoiled, max_bad_steps=3, checkpoint_every=2
        )
    return out, str(caught.value)


def test_a_run_stops_after_so_many_bad_steps_in_a_row(spoiled_run):
    out, message = spoiled_run
    assert message.startswith("3 steps in a row, up to step 7, had a loss or gradient that was not finite")
    rows = read_metrics(out)
    assert [row["skipped"] for row in rows] == [1, 0, 1, 0, 1, 1, 1]
    assert [row["loss"] is None for row in rows] == [True, False, True, False, True, True, True]
    factor = tiny.TRAINING.schedule.build(8)
    used = [row["lr"] for row in rows if not row["skipped"]]
    assert used == pytest.approx([1e-2 * float(factor(n)) for n in range(2)])


def test_the_checkpoint_before_bad_steps_stays_usable(spoiled_run, tmp_path):
    out = shutil.copytree(spoiled_run[0], tmp_path / "run")
    with Checkpoints(out / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    assert all(np.isfinite(array).all() for array in tiny.parameters(load(out)).values())
    changes = {"objective": tiny.nan_at_spoiled, "max_bad_steps": 3, "checkpoint_every": 2}
    with pytest.raises(RunError, match="3 steps in a row, up to step 7"):  # two of them were counted before
        tiny.train(out, tiny.Walks(spoil=(7,)), **changes)
    fitted = tiny.train(out, tiny.Walks(), **changes)
    assert [row["step"] for row in read_metrics(out)] == list(range(1, 9))
    assert np.isfinite(np.asarray(fitted.model.head.kernel[...])).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "training.steps is 0; it must be at least 1"),
        ({"batch_size": -8}, "training.batch_size is -8; it must be at least 1"),
        ({"n_microbatches": 3}, "training.batch_size is 8, which n_microbatches 3 does not divide; make it a multiple"),
        ({"checkpoint_every": 0}, "training.checkpoint_every is 0; it must be at least 1"),
        ({"keep_checkpoints": 0}, "training.keep_checkpoints is 0; it must be at least 1"),
        ({"max_bad_steps": 0}, "training.max_bad_steps is 0; it must be at least 1"),
        ({"eval_every": 0}, "training.eval_every is 0; give at least 1, or None"),
        ({"clip_norm": 0.0}, "training.clip_norm is 0.0; give a positive number or None"),
        ({"ema_decay": 1.0}, "training.ema_decay is 1.0; give a number between 0 and 1, or None"),
    ],
)
def test_an_impossible_training_is_one_sentence(changes, said):
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(tiny.TRAINING, **changes)
    assert str(caught.value) == said


def test_rows_that_the_mesh_cannot_split_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"batch"):
        tiny.train(tmp_path / "run", devices=8, n_microbatches=2)


def test_a_row_longer_than_the_model_takes_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.max_length is 4"):
        tiny.train(tmp_path / "run", model=tiny.MODEL.replace(max_length=4))


def test_a_new_run_starts_from_an_initial_model_and_a_continued_one_does_not(tmp_path):
    trained = tiny.train(tmp_path / "first").model
    asked = []

    def initial():
        asked.append(1)
        return trained

    changes = {"initial": initial, "steps": 1, "optimizer": AdamW(peak_lr=1e-12), "ema_decay": 0.5}
    first = tiny.train(tmp_path / "run", **changes)
    tiny.assert_same_parameters(first.model, trained, atol=1e-6)
    assert tiny.numbers(tmp_path / "run")[0][1] < tiny.numbers(tmp_path / "first")[0][1] - 0.5
    tiny.train(tmp_path / "run", **changes)
    assert asked == [1]


def test_a_run_on_several_devices_starts_from_a_model_that_lies_on_one(unbroken, tmp_path):
    """``load`` compares fingerprints, and an initial model may be computed from it, both beside the run's mesh."""

    def initial():
        graph, variables = nnx.split(load(unbroken[0]))
        return nnx.merge(graph, jax.jit(lambda tree: jax.tree.map(lambda x: 1 * x, tree))(variables))

    run = tiny.train(tmp_path / "run", initial=initial, devices=2, steps=1, optimizer=AdamW(peak_lr=1e-12))
    tiny.assert_same_parameters(run.model, load(unbroken[0]), atol=1e-6)


def test_an_initial_model_of_another_shape_is_refused(tmp_path):
    other = dataclasses.replace(tiny.MODEL, d_model=2 * tiny.MODEL.d_model)
    wide = tiny.train(tmp_path / "wide", model=other, steps=1).model
    with pytest.raises(RunError, match="the initial model has other variables"):
        tiny.train(tmp_path / "run", initial=lambda: wide)
