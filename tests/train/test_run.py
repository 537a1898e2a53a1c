"""The run directory: whose it is, what is written to it, and what comes back from it."""

import dataclasses
import hashlib
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

import efftrain
from efftrain.errors import RunError
from efftrain.sharding.mesh import MeshConfig
from efftrain.train.run import directory as run_module
from efftrain.train.run import environment as environment_module
from efftrain.train.run.directory import Run, load, load_model_config
from efftrain.train.run.environment import git_commit

OWN_MLP = Path(__file__).with_name("own_mlp_recipe.py")


def hashes(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def changed(**training) -> tiny.Config:
    return tiny.Config(training=dataclasses.replace(tiny.TRAINING, **training))


def test_another_configuration_is_refused_and_nothing_is_overwritten(crashed):
    before = hashes(crashed)
    with pytest.raises(RunError, match=r"another configuration \(training\.seed: 0 -> 1\); choose another --out"):
        Run(crashed, changed(seed=1))
    with pytest.raises(RunError, match=r"\(training\.batch_size: 8 -> 16 and 1 more\)"):
        Run(crashed, changed(batch_size=16, seed=1))
    with pytest.raises(RunError, match=r"\(note: 'as a recipe would have it' -> 'x'\)"):
        Run(crashed, tiny.Config(note="x"))
    assert hashes(crashed) == before


def test_a_run_without_a_step_gives_place_to_the_corrected_command(tmp_path):
    """It was refused, or ended before its first step; a checkpoint, or a row of a step, is kept."""
    Run(tmp_path, changed(seed=1), inputs={"corpus": "a"})
    Run(tmp_path, changed(seed=2), inputs={"corpus": "b"})
    assert json.loads((tmp_path / "config.json").read_text())["training"]["seed"] == 2
    assert json.loads((tmp_path / "identity.json").read_text())["inputs"] == {"corpus": "b"}
    with (tmp_path / "metrics.jsonl").open("w") as metrics:
        Run(tmp_path, changed(seed=3))
        metrics.write(json.dumps({"step": 1, "split": "train", "loss": 1.0}) + "\n")
    with pytest.raises(RunError, match=r"training\.seed: 3 -> 4"):
        Run(tmp_path, changed(seed=4))
    (tmp_path / "metrics.jsonl").unlink()
    elsewhere = tmp_path / "elsewhere"
    Run(tmp_path, changed(checkpoints=str(elsewhere)))
    (elsewhere / "3").mkdir(parents=True)
    with pytest.raises(RunError, match=r"training\.seed: 0 -> 4"):
        Run(tmp_path, changed(seed=4))


def test_how_a_run_is_carried_out_may_change(crashed):
    other = changed(checkpoint_every=5, keep_checkpoints=9, eval_every=2, mesh=MeshConfig(fsdp=2, tensor=4))
    Run(crashed, other)
    assert json.loads((crashed / "config.json").read_text())["training"]["checkpoint_every"] == 5
    assert load_model_config(crashed) == tiny.MODEL


def test_checkpoints_that_stay_behind_are_not_forgotten(crashed, tmp_path):
    """With another folder a run began again at step 1, and dropped the rows that it had."""
    elsewhere, before = tmp_path / "elsewhere", hashes(crashed)
    with pytest.raises(
        RunError, match=r"elsewhere has no checkpoint, and the run .* keeps its checkpoints in .*; move them there"
    ):
        Run(crashed, changed(checkpoints=str(elsewhere)))
    assert hashes(crashed) == before
    (crashed / "checkpoints").rename(elsewhere)
    Run(crashed, changed(checkpoints=str(elsewhere)))


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(RunError, match=r"is not empty and holds no config\.json, so it is not a run; choose another"):
        Run(tmp_path, tiny.Config())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory_becomes_a_run(tmp_path):
    Run(tmp_path, tiny.Config())
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize("stage", ["write_json", "environment", "_copy_recipe"])
def test_a_process_killed_while_it_made_the_directory_leaves_no_obstacle(tmp_path, monkeypatch, stage):
    """Whatever the moment, the same command works afterwards."""

    class Killed(BaseException):
        pass

    def killed(self, name="", value=None):
        (tmp_path / "run" / ".config.json.incomplete").write_text("{")
        raise Killed

    with monkeypatch.context() as patch:
        if stage == "environment":
            patch.setattr(run_module, "environment", lambda: killed(None))
        else:
            patch.setattr(Run, stage, killed)
        with pytest.raises(Killed):
            Run(tmp_path / "run", tiny.Config())
    Run(tmp_path / "run", tiny.Config())
    assert json.loads((tmp_path / "run" / "config.json").read_text())["note"]


def test_a_path_that_cannot_be_a_directory_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/efftrain")):
        with pytest.raises(RunError, match=r"cannot write to \S+ \(.+\); choose another --out") as caught:
            Run(path, tiny.Config())
        assert "\n" not in str(caught.value)


def test_a_configuration_that_is_not_json_is_named(crashed):
    (crashed / "config.json").write_text("{ half")
    with pytest.raises(RunError, match=r"config\.json is not valid JSON"):
        Run(crashed, tiny.Config())
    assert (crashed / "config.json").read_text() == "{ half"


def test_the_environment_says_what_a_figure_depends_on(unbroken):
    environment = json.loads((unbroken[0] / "environment.json").read_text())
    assert environment.keys() >= {
        *("time", "command", "commit", "python", "platform", "cpu", "cpu_cores", "processes", "devices"),
        *("packages", "malloc", "xla_flags"),
    }
    assert environment["packages"]["jax"] == jax.__version__
    assert environment["devices"] == ["cpu:cpu"] * 8


def test_the_commit_is_that_of_efftrain_and_of_nothing_around_it(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "the user's own"], check=True)
    copy = tmp_path / "site-packages" / "run.py"
    copy.parent.mkdir()
    shutil.copy(environment_module.__file__, copy)
    monkeypatch.setattr(environment_module, "__file__", str(copy))
    assert git_commit() is None
    subprocess.run([*git, "add", "."], check=True)
    assert git_commit().endswith("+changes")


def logits(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda tokens: model(tokens))(jnp.asarray(tiny.walk(1)["tokens"])))


def test_load_gives_the_fitted_model(unbroken):
    out, fitted = unbroken
    before = hashes(out)
    model = efftrain.load(out)
    tiny.assert_same_parameters(model, fitted.model)
    np.testing.assert_array_equal(logits(model), logits(fitted.model))
    assert model.config == tiny.MODEL
    assert hashes(out) == before


def test_load_and_evaluation_use_the_averaged_parameters(tmp_path):
    evaluated = []

    def evaluate(model):
        evaluated.append(tiny.parameters(model))
        return {"bpb": 1.0}

    fitted = tiny.train(tmp_path / "run", steps=3, ema_decay=0.9, evaluate=evaluate)
    model = load(tmp_path / "run")
    tiny.assert_same_parameters(model, fitted.model)
    for name, want in evaluated[-1].items():
        np.testing.assert_array_equal(tiny.parameters(model)[name], want)
    from efftrain.train.checkpoints.checkpoints import Checkpoints

    flat = {f"{part}/head/kernel": jax.ShapeDtypeStruct((16, tiny.VOCAB), jnp.float32) for part in ("params", "ema")}
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        saved, _ = checkpoints._read(3, flat, partial=True)
    np.testing.assert_array_equal(model.head.kernel[...], saved["ema/head/kernel"])
    assert np.abs(saved["params/head/kernel"] - saved["ema/head/kernel"]).max() > 1e-3


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"holds no config\.json, so it is not a run"):
        load(tmp_path)
    Run(tmp_path / "run", tiny.Config())
    with pytest.raises(RunError, match=r"checkpoints holds no checkpoint; train the run first"):
        load(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    Run(tmp_path / "other", {"steps": 3})
    with pytest.raises(RunError, match=r"has no field 'model' that is a ModelConfig"):
        load(tmp_path / "other")


def python(*arguments, devices: int = 1, expect: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=tiny.environment(devices),
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_model_of_the_recipes_own_parts_is_loaded_without_the_recipe(tmp_path):
    """Trained on eight devices by a script with its own feed-forward part; loaded on one, and with the script gone."""
    script = Path(shutil.copy(OWN_MLP, tmp_path / "mine.py"))
    python(script, tmp_path / "run", devices=8)
    want = np.load(tmp_path / "run" / "logits.npy")
    script.unlink()
    python(
        "-c",
        "import sys, efftrain, numpy as np, jax.numpy as jnp; m = efftrain.load(sys.argv[1]);"
        "assert type(m.blocks[0].mlp).__name__ == 'Squared', m.blocks[0].mlp;"
        "np.testing.assert_allclose(m(jnp.arange(8)[None]), np.load(sys.argv[1] + '/logits.npy'), atol=1e-5)",
        tmp_path / "run",
    )
    model = load(tmp_path / "run")
    np.testing.assert_allclose(model(jnp.arange(8)[None]), want, atol=1e-5)
    assert type(model.config.pattern[0].mlp).__name__ == "SquaredConfig"
