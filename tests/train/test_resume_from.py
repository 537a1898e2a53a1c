"""A run that goes on from a checkpoint of another one."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import MODEL, TRAINING, Config, Crash, Walks, walk

import efftrain
from efftrain.compress.pruning.sparsify import hold_zeros
from efftrain.errors import ConfigError, RunError
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.number_formats import Integer
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.loop import TrainResult, fit
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.resume_from import with_resume_schedule
from efftrain.train.run.directory import Run
from efftrain.train.state import split_model

INT4 = Integer(bits=4, group=8)


def train(out: Path, config: Config, batches: Walks | None = None, **changes) -> TrainResult:
    training = dataclasses.replace(config.training, **changes)
    config = dataclasses.replace(config, training=training)
    model = config.model
    batches = batches or Walks()
    return fit(lambda rngs: Decoder(model, rngs=rngs), next_token_loss, batches, training, Run(out, config))


def quantized(**changes) -> Config:
    rule = QuantizationRule(weights=INT4, **changes)
    return Config(model=MODEL.replace(quantization=Quantization(rules=(rule,))))


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """Eight steps, with checkpoints of 3, 6 and 8."""
    out = tmp_path_factory.mktemp("runs") / "dense"
    train(out, Config(), keep_every=3, ema_decay=0.9)
    return out


def test_resuming_from_the_same_run_gives_that_run_to_the_bit(dense, tmp_path):
    """Parameters, averages, optimizer state, keys and the place in the data."""
    train(tmp_path / "run", Config(), resume_from=f"{dense}@3", ema_decay=0.9)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(efftrain.load(tmp_path / "run")), nnx.state(efftrain.load(dense))
    )
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [4, 5, 6, 7, 8]
    losses = [[row["loss"] for row in read_metrics(run)][-5:] for run in (dense, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_a_resumed_run_that_was_stopped_continues_from_its_own_checkpoint(dense, tmp_path, capsys):
    train(tmp_path, Config(), resume_from=f"{dense}@3", ema_decay=0.9)
    assert "resuming from step 3" in capsys.readouterr().err
    train(tmp_path, Config(), resume_from=f"{dense}@3", ema_decay=0.9)
    assert "is trained already" in capsys.readouterr().err


def test_what_the_other_run_does_not_have_starts_as_built(dense, tmp_path):
    """Learned steps, and their moments: at the steps of the largest magnitude."""
    one = train(tmp_path, quantized(learned_step=True), resume_from=f"{dense}@3", ema_decay=0.9, steps=5).model
    ratio = one.blocks[0].mlp.up.kernel_step_ratio[...]
    assert 0 < np.abs(np.asarray(ratio) - 1).max() < 0.1
    first = read_metrics(tmp_path)[0]["loss"]
    float_loss = read_metrics(dense)[3]["loss"]
    assert first == pytest.approx(float_loss, abs=0.2)
    assert first != float_loss


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{dense}", ConfigError, "give a run and the step of a checkpoint, such as runs/dense@480"),
        ("{dense}@8", ConfigError, "training.steps 8; give more steps than the checkpoint has"),
        ("{dense}@5", RunError, "has checkpoints of steps 3, 6, 8 and not of 5"),
        ("nowhere@3", RunError, "nowhere holds no run; train it first"),
    ],
)
def test_what_cannot_be_resumed_from_is_refused(dense, tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", Config(), resume_from=text.format(dense=dense), ema_decay=0.9)


def test_a_checkpoint_that_was_refused_does_not_refuse_the_corrected_command(dense, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(RunError, match="has checkpoints of steps 3, 6, 8 and not of 5"):
        train(out, Config(), resume_from=f"{dense}@5", ema_decay=0.9, steps=9)
    with pytest.raises(RunError, match="is a checkpoint of another model or optimizer"):
        train(out, Config(model=MODEL.replace(d_model=32)), resume_from=f"{dense}@3", ema_decay=0.9)
    train(out, Config(), resume_from=f"{dense}@8", ema_decay=0.9, steps=9)
    assert [row["step"] for row in read_metrics(out)] == [9]


def test_a_run_of_another_model_is_refused(dense, tmp_path):
    other = Config(model=MODEL.replace(d_model=32))
    with pytest.raises(RunError, match="is a checkpoint of another model or optimizer: params/"):
        train(tmp_path, other, resume_from=f"{dense}@3", ema_decay=0.9)
    with pytest.raises(RunError, match="is a checkpoint of another model or optimizer"):
        train(tmp_path / "no-average", Config(), resume_from=f"{dense}@3")


def test_a_model_alone_is_refused_for_what_it_lacks(dense, tmp_path):
    """As ``efftrain compress`` leaves it: of the same model, without an optimizer's state."""
    shutil.copytree(dense, tmp_path / "compressed", ignore=shutil.ignore_patterns("checkpoints"))
    _, params, rest = split_model(efftrain.load(dense))
    with Checkpoints(tmp_path / "compressed" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params, "model_state": rest}, None, None, squeezed=True)
    with pytest.raises(RunError, match=r"holds a model without the state of an optimizer .*resume from the run that"):
        train(tmp_path / "run", Config(), resume_from=f"{tmp_path / 'compressed'}@3")


def test_a_run_starts_from_one_thing(dense, tmp_path):
    training = dataclasses.replace(TRAINING, resume_from=f"{dense}@3")
    config = Config(training=training)
    with pytest.raises(ConfigError, match=r"training\.resume_from is set and the run starts from a model"):
        fit(
            lambda rngs: Decoder(MODEL, rngs=rngs),
            next_token_loss,
            Walks(),
            training,
            Run(tmp_path, config),
            initial=lambda: efftrain.load(dense),
        )


def test_a_run_of_before_a_field_existed_continues(dense, tmp_path):
    """A field that config.json does not have yet counts as its default."""
    out = tmp_path / "old"
    train(out, Config(), steps=3)
    saved = json.loads((out / "config.json").read_text())
    del saved["model"]["quantization"], saved["training"]["resume_from"]
    (out / "config.json").write_text(json.dumps(saved))
    train(out, Config(), steps=3)
    saved["model"]["d_model"] = 8
    (out / "config.json").write_text(json.dumps(saved))
    with pytest.raises(RunError, match=r"model\.d_model: 8 -> 16"):
        train(out, Config(), steps=3)


def said(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def rate_of(dense: Path, step: int) -> float:
    return next(row["lr"] for row in read_metrics(dense) if row["step"] == step)


def peak_share(steps: int, step: int) -> float:
    """Of step ``step`` (from 1) of so many, as Hu et al. 2024 and Haegele et al. 2024 write it: shares .02 and .2."""
    up = min(1.0, step / max(0.02 * steps, 1.0))
    done = max(step - 1 - 0.8 * steps, 0.0) / max(0.2 * steps, 1.0)
    return up * (1 - np.sqrt(min(done, 1.0)))


def test_extending_a_finished_run_shows_the_learning_rate_and_warns_of_its_jump(dense, tmp_path, capsys):
    """By default the rate is that of the longer schedule at once; the run says so before its first step."""
    train(tmp_path, Config(), resume_from=f"{dense}@8", ema_decay=0.9, steps=10)
    output = said(capsys)
    before = rate_of(dense, 8)
    assert before == pytest.approx(1e-2 * peak_share(8, 8), rel=1e-5)
    assert f"learning rate: {before:.3g} at step 8 of {dense}, 0.01 at step 9 here" in output
    assert f"warning: the learning rate rises from {before:.3g} to 0.01; resume from the stable phase" in output
    assert "(its peak lasted until step 7)" in output
    assert rate_of(tmp_path, 9) == pytest.approx(1e-2)


@pytest.mark.parametrize("choice", ["as_configured", "constant", "rewarm"])
def test_the_learning_rate_after_resuming_can_be_chosen(dense, tmp_path, choice):
    steps, shared = 108, 8
    training = dataclasses.replace(TRAINING, steps=steps, resume_from=f"{dense}@{shared}", resume_schedule=choice)
    factor = with_resume_schedule(training, Run(tmp_path, Config(training=training))).schedule.build(steps)
    configured = [peak_share(steps, n) for n in range(shared + 1, steps + 1)]
    want = {
        "as_configured": configured,
        "constant": [min(peak_share(shared, shared), share) for share in configured],
        "rewarm": [peak_share(steps - shared, n) for n in range(1, steps - shared + 1)],
    }[choice]
    np.testing.assert_allclose([factor(n) for n in range(shared, steps)], want, rtol=1e-4, atol=1e-7)
    assert len({round(share, 6) for share in want}) > 10


def test_a_resumed_run_at_a_constant_rate_goes_on_without_the_other(dense, tmp_path, capsys):
    moved = Path(shutil.copytree(dense, tmp_path / "dense"))
    settings = {"resume_from": f"{moved}@8", "ema_decay": 0.9, "resume_schedule": "constant", "steps": 12}
    with pytest.raises(Crash):
        train(tmp_path / "run", Config(), Walks(crash_at=12), **settings)
    assert read_metrics(tmp_path / "run")[-1]["step"] >= 9
    shutil.rmtree(moved)
    train(tmp_path / "run", Config(), **settings)
    assert "continuing from step 9" in said(capsys)
    found = [row["lr"] for row in read_metrics(tmp_path / "run")]
    kept = rate_of(dense, 8)
    assert found == pytest.approx([min(kept, 1e-2 * peak_share(12, step)) for step in range(9, 13)], rel=1e-4)
    assert found[0] == pytest.approx(kept, rel=1e-5)
    assert found[-1] < kept
    # What the optimizer did, and not only what was written: AdamW moves a number by about the rate in each step.
    before, after = (head(run, step) for run, step in ((dense, 8), (tmp_path / "run", 12)))
    assert 0.2 * sum(found) < np.abs(after - before).max() < 1.5 * sum(found)


def head(run: Path, step: int) -> np.ndarray:
    wanted = {"params/head/kernel": jax.ShapeDtypeStruct((16, MODEL.vocab_size), np.float32)}
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return np.asarray(checkpoints._read(step, wanted, partial=True)[0]["params/head/kernel"])


def test_a_rate_that_is_not_known_cannot_stay(dense, tmp_path):
    bare = Path(shutil.copytree(dense, tmp_path / "dense"))
    (bare / "metrics.jsonl").unlink()
    with pytest.raises(
        RunError, match=r"metrics\.jsonl has no learning rate of step 8; choose as_configured or rewarm"
    ):
        train(tmp_path / "run", Config(), resume_from=f"{bare}@8", ema_decay=0.9, resume_schedule="constant", steps=9)
    with pytest.raises(ConfigError, match=r"training\.resume_schedule has no effect without training\.resume_from"):
        dataclasses.replace(TRAINING, resume_schedule="rewarm")


def test_resuming_on_other_data_is_refused_with_what_to_do(dense, tmp_path):
    class Other(Walks):
        def set_state(self, state):
            raise RunError("the saved position of the data belongs to another corpus")

    with pytest.raises(RunError, match=rf"training\.resume_from: {dense} read other data .* with training\.finetune"):
        train(tmp_path, Config(), Other(), resume_from=f"{dense}@3", ema_decay=0.9)


def test_fine_tuning_starts_from_the_model_alone(dense, tmp_path, capsys):
    """The averaged parameters, a new optimizer state, the first batch; equal to the bit to a start from that model."""
    tuned = train(tmp_path / "run", Config(), finetune=dense, steps=3)
    rate = rate_of(dense, 8)
    line = f"learning rate: {rate:.3g} at the last step of {dense}; here 0.01 at step 1, at most 0.01"
    assert line in said(capsys)
    config = dataclasses.replace(TRAINING, steps=3)
    run = Run(tmp_path / "same", Config(training=config))
    build = partial(Decoder, MODEL)
    same = fit(
        lambda rngs: build(rngs=rngs), next_token_loss, Walks(), config, run, initial=lambda: efftrain.load(dense)
    )
    jax.tree.map(np.testing.assert_array_equal, nnx.state(tuned.model), nnx.state(same.model))
    total, count = next_token_loss(efftrain.load(dense), walk(1), None)[2]["loss"]
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(float(total / count), rel=1e-5)
    with pytest.raises(ConfigError, match=r"training\.finetune is set and the run starts from a model"):
        fit(
            lambda rngs: build(rngs=rngs),
            next_token_loss,
            Walks(),
            dataclasses.replace(config, finetune=dense),
            run,
            initial=lambda: efftrain.load(dense),
        )


def test_training_that_would_fill_the_zeros_of_its_model_says_so(tmp_path, capsys):
    model = Decoder(MODEL, rngs=nnx.Rngs(0))
    for block in model.blocks:
        block.mlp.up.kernel[...] = block.mlp.up.kernel[...].at[:, ::2].set(0)
    training = dataclasses.replace(TRAINING, steps=1)
    share = zeros_share(model)
    warning = (
        f"warning: {share:.0%} of the weights of the initial model's blocks are zero, and this training fills them"
    )
    for name, wrap in {"dense": None, "sparse": hold_zeros().around(training)}.items():
        run = Run(tmp_path / name, Config(training=training))
        fitted = fit(
            lambda rngs: Decoder(MODEL, rngs=rngs),
            next_token_loss,
            Walks(),
            training,
            run,
            wrap=wrap,
            initial=lambda: model,
        )
        output = said(capsys)
        assert (warning in output) == (zeros_share(fitted.model) != share) == (name == "dense")
        assert "learning rate: 0.01 at step 1, at most 0.01" in output
