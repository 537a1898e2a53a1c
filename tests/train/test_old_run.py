"""A run directory that commit 4f30595 has left, stopped after step 3: it opens, and goes on as a run of today."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import efftrain
from efftrain.config import from_json
from efftrain.models.decoding.generate import generate
from efftrain.train.metrics.metrics_log import read_metrics

OLD = Path(__file__).with_name("run_of_4f30595")
PACKAGE = Path(efftrain.__file__).parent
TRAINING = dataclasses.replace(tiny.TRAINING, keep_checkpoints=1)
MOVED = {"efftrain.models.config": "efftrain.models.shapes", "efftrain.train.schedules": "efftrain.train.rates"}


@pytest.fixture
def old(tmp_path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def logits(model: nnx.Module) -> np.ndarray:
    graph, state = nnx.split(model)
    return np.asarray(jax.jit(lambda state, t: nnx.merge(graph, state)(t))(state, tiny.walk(1)["tokens"][:2]))


def test_it_opens_and_computes_what_it_did(old):
    assert '"efftrain.models.config:ModelConfig"' in (old / "config.json").read_text()
    assert from_json(json.loads((old / "config.json").read_text())) == tiny.Config(training=TRAINING)
    model = efftrain.load(old)
    np.testing.assert_allclose(logits(model), np.load(OLD / "logits.npy"), rtol=1e-4, atol=1e-4)
    prompts = jnp.asarray(tiny.walk(1)["tokens"][:2])
    drawn = generate(model, prompts, jnp.array([8, 8]), n_new=1)
    np.testing.assert_array_equal(drawn[:, 0], np.load(OLD / "logits.npy")[:, -1].argmax(-1))


def test_it_goes_on_and_ends_as_a_run_of_today(old, unbroken, capfd):
    fitted = tiny.train(old, keep_checkpoints=1)
    said = " ".join(capfd.readouterr().err.split())
    assert "continuing from step 3" in said
    assert f"{old} was started with other code and continues with this code (changed since: efftrain" in said
    tiny.assert_same_parameters(fitted.model, unbroken[1].model, atol=2e-4)
    rows = [[row["loss"] for row in read_metrics(run)] for run in (old, unbroken[0])]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4)


def test_it_opens_where_its_classes_have_moved(old, tmp_path):
    """A copy of the package in which two modules have other names, as the next restructuring will give them."""
    copied = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix != ".pyc"]
    for path in [*copied, Path(tiny.__file__)]:
        place = tmp_path / "moved" / (path.relative_to(PACKAGE.parent) if path in copied else path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        for before, after in MOVED.items():
            text = text.replace(before, after)
        place.write_text(text)
    for before, after in MOVED.items():
        module = tmp_path / "moved" / before.replace(".", "/")
        module.with_suffix(".py").rename((tmp_path / "moved" / after.replace(".", "/")).with_suffix(".py"))
    program = """
import sys, numpy as np, tiny, efftrain, efftrain.models.shapes
from efftrain.train.run.directory import Run
model, run = efftrain.load(sys.argv[1]), sys.argv[1]
assert type(model.config).__module__ == "efftrain.models.shapes"
np.testing.assert_allclose(
    model(tiny.walk(1)["tokens"][:2]), np.load(run + "/logits.npy"), rtol=1e-4, atol=1e-4
)
Run(run, tiny.Config())
"""
    environment = tiny.environment() | {"PYTHONPATH": str(tmp_path / "moved")}
    command = [sys.executable, "-c", program, str(old)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert '"type": "ModelConfig"' in (old / "config.json").read_text()
