"""A run that goes on from a checkpoint of another one."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import MODEL, TRAINING, Config, Walks

import efftrain
from efftrain.errors import ConfigError, RunError
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.number_formats import Integer
from efftrain.train.checkpoints import Checkpoints
from efftrain.train.loop import Fitted, fit
from efftrain.train.objective import next_token_loss
from efftrain.train.run import Run, read_metrics
from efftrain.train.state import split_model

INT4 = Integer(bits=4, group=8)


def train(out: Path, config: Config, **changes) -> Fitted:
    training = dataclasses.replace(config.training, **changes)
    config = dataclasses.replace(config, training=training)
    model = config.model
    return fit(lambda rngs: Decoder(model, rngs=rngs), next_token_loss, Walks(), training, Run(out, config))


def quantized(**changes) -> Config:
    rule = QuantizationRule(weights=INT4, **changes)
    return Config(model=MODEL.replace(quantization=Quantization(rules=(rule,))))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    """Eight steps, with checkpoints of 3, 6 and 8."""
    out = tmp_path_factory.mktemp("runs") / "trunk"
    train(out, Config(), keep_every=3, ema_decay=0.9)
    return out


def test_a_branch_of_the_same_run_is_that_run_to_the_bit(trunk, tmp_path):
    """Parameters, averages, optimizer state, keys and the place in the data."""
    train(tmp_path / "run", Config(), branch=f"{trunk}@3", ema_decay=0.9)
    jax.tree.map(
        np.testing.assert_array_equal, nnx.state(efftrain.load(tmp_path / "run")), nnx.state(efftrain.load(trunk))
    )
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [4, 5, 6, 7, 8]
    losses = [[row["loss"] for row in read_metrics(run)][-5:] for run in (trunk, tmp_path / "run")]
    assert losses[0] == losses[1]


def test_a_branch_that_was_stopped_continues_from_its_own_checkpoint(trunk, tmp_path, capsys):
    train(tmp_path, Config(), branch=f"{trunk}@3", ema_decay=0.9)
    assert "branching from step 3" in capsys.readouterr().err
    train(tmp_path, Config(), branch=f"{trunk}@3", ema_decay=0.9)
    assert "is trained already" in capsys.readouterr().err


def test_what_a_trunk_does_not_have_starts_as_built(trunk, tmp_path):
    """Learned steps, and their moments: at the steps of the largest magnitude."""
    one = train(tmp_path, quantized(learned_step=True), branch=f"{trunk}@3", ema_decay=0.9, steps=5).model
    ratio = one.blocks[0].mlp.up.kernel_step_ratio[...]
    assert 0 < np.abs(np.asarray(ratio) - 1).max() < 0.1
    first = read_metrics(tmp_path)[0]["loss"]
    float_loss = read_metrics(trunk)[3]["loss"]
    assert first == pytest.approx(float_loss, abs=0.2)
    assert first != float_loss


@pytest.mark.parametrize(
    ("branch", "error", "message"),
    [
        ("{trunk}", ConfigError, "give a run and the step of a checkpoint, such as runs/dense@480"),
        ("{trunk}@8", ConfigError, "training.steps 8; a branch needs steps of its own"),
        ("{trunk}@5", RunError, "has checkpoints of steps 3, 6, 8 and not of 5"),
        ("nowhere@3", RunError, "nowhere holds no run; train it first"),
    ],
)
def test_what_cannot_be_branched_from_is_refused(trunk, tmp_path, branch, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "run", Config(), branch=branch.format(trunk=trunk), ema_decay=0.9)


def test_a_trunk_of_another_model_is_refused(trunk, tmp_path):
    other = Config(model=MODEL.replace(d_model=32))
    with pytest.raises(RunError, match="is a checkpoint of another model or optimizer: params/"):
        train(tmp_path, other, branch=f"{trunk}@3", ema_decay=0.9)
    with pytest.raises(RunError, match="is a checkpoint of another model or optimizer"):
        train(tmp_path / "no-average", Config(), branch=f"{trunk}@3")


def test_a_model_alone_is_refused_for_what_it_lacks(trunk, tmp_path):
    """As ``efftrain compress`` leaves it: of the same model, without an optimizer's state."""
    shutil.copytree(trunk, tmp_path / "compressed", ignore=shutil.ignore_patterns("checkpoints"))
    _, params, rest = split_model(efftrain.load(trunk))
    with Checkpoints(tmp_path / "compressed" / "checkpoints") as checkpoints:
        checkpoints.save(3, {"params": params, "model_state": rest}, None, None, squeezed=True)
    with pytest.raises(RunError, match=r"holds a model without the state of an optimizer .*branch from the run that"):
        train(tmp_path / "run", Config(), branch=f"{tmp_path / 'compressed'}@3")


def test_a_run_starts_from_one_thing(trunk, tmp_path):
    training = dataclasses.replace(TRAINING, branch=f"{trunk}@3")
    config = Config(training=training)
    with pytest.raises(ConfigError, match=r"training\.branch is set and the run starts from a model"):
        fit(
            lambda rngs: Decoder(MODEL, rngs=rngs),
            next_token_loss,
            Walks(),
            training,
            Run(tmp_path, config),
            initial=lambda: efftrain.load(trunk),
        )


def test_a_run_of_before_a_field_existed_continues(trunk, tmp_path):
    """A field that config.json does not have yet counts as its default."""
    out = tmp_path / "old"
    train(out, Config(), steps=3)
    saved = json.loads((out / "config.json").read_text())
    del saved["model"]["quantization"], saved["training"]["branch"]
    (out / "config.json").write_text(json.dumps(saved))
    train(out, Config(), steps=3)
    saved["model"]["d_model"] = 8
    (out / "config.json").write_text(json.dumps(saved))
    with pytest.raises(RunError, match=r"model\.d_model: 8 -> 16"):
        train(out, Config(), steps=3)
