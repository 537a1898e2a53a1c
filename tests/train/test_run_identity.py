"""A run of other code: it goes on with a warning while it is unfinished, and is refused when it is finished."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from efftrain import code_identity
from efftrain.errors import RunError
from efftrain.models.decoder import Decoder
from efftrain.recipe import import_script
from efftrain.train.loop import fit
from efftrain.train.metrics.metrics_log import read_metrics
from efftrain.train.run.directory import Run, load_model_config

SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.train.config import Training
from efftrain.train.run.directory import Run

@dataclass(frozen=True, kw_only=True)
class Odd(Dense):
    SCALE = 1.0

@dataclass(frozen=True, kw_only=True)
class Config:
    model: ModelConfig = ModelConfig(
        vocab_size=10, d_model=8, max_length=8, n_repeats=1,
        pattern=(BlockConfig(attention=Attention(n_heads=2, n_kv_heads=2, d_head=4, n_blocks=1), mlp=Odd(d_ff=16)),),
    )
    training: Training = Training(steps=8, batch_size=8, length=8)

def loss(model, batch, key):
    return 0.0

if __name__ == "__main__":
    Run(Path(sys.argv[1]), Config())
"""

WITH_A_MODULE = """
from dataclasses import dataclass

import tiny
import own_losses

@dataclass(frozen=True, kw_only=True)
class Config(tiny.Config):
    pass

def loss(model, batch, key):
    return own_losses.loss(model, batch, key)
"""

TINY = Path(tiny.__file__).read_text()
LOSSES = """
from efftrain.train.objectives.objective import next_token_loss

def loss(model, batch, key):
    loss, count, metrics = next_token_loss(model, batch, key)
    return 1.0 * loss, count, metrics
"""


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCRIPT)
    return path


def made(script: Path, out: Path, step: int) -> Path:
    """A run with a checkpoint, as far as its directory tells."""
    Run(out, import_script(script).Config(), script=script)
    (out / "checkpoints" / str(step)).mkdir(parents=True)
    return out


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


def test_a_changed_block_is_named_when_a_run_goes_on(script, tmp_path, capfd):
    out = made(script, tmp_path / "run", step=3)
    Run(out, import_script(script).Config(), script=script)
    assert "warning" not in capfd.readouterr().err
    script.write_text(SCRIPT.replace("SCALE = 1.0", "SCALE = 2.0"))
    Run(out, import_script(script).Config(), script=script)
    said = " ".join(capfd.readouterr().err.split())
    assert f"warning: {out} was started with other code and continues with this code (changed since: mine.py)" in said
    assert load_model_config(out).pattern[0].mlp.SCALE == 2.0
    Run(out, import_script(script).Config(), script=script)
    assert "warning" not in capfd.readouterr().err


def test_a_finished_run_of_a_changed_block_is_refused_and_stays_as_it_is(script, tmp_path):
    """Before, its recipe was replaced by the changed one: ``load`` then gave another model than was trained."""
    out = made(script, tmp_path / "run", step=8)
    before = files(out)
    Run(out, import_script(script).Config(), script=script)
    assert files(out) == before
    script.write_text(SCRIPT.replace("SCALE = 1.0", "SCALE = 2.0"))
    with pytest.raises(
        RunError, match=r"was trained with other code \(changed since: mine\.py\); choose another --out"
    ):
        Run(out, import_script(script).Config(), script=script)
    assert files(out) == before
    assert load_model_config(out).pattern[0].mlp.SCALE == 1.0


def test_a_changed_loss_in_the_running_script_counts(script, tmp_path):
    """No field of the configuration names it."""

    def start() -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, script, tmp_path / "run"], capture_output=True, text=True, env=tiny.environment()
        )
        return done.returncode, done.stderr

    assert start()[0] == 0
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    script.write_text(SCRIPT.replace("return 0.0", "return 1.0"))
    code, said = start()
    assert code == 0, said
    assert "changed since: mine.py" in " ".join(said.split())
    (tmp_path / "run" / "training.json").write_text("{}")  # finished; its checkpoints may be gone
    script.write_text(SCRIPT.replace("return 0.0", "return 2.0"))
    code, said = start()
    assert code == 2
    assert "was trained with other code" in " ".join(said.split())


def test_a_changed_module_beside_the_recipe_is_named_and_the_old_sources_stay(tmp_path, monkeypatch, capfd):
    """From the history a reader can tell which of them made a step; without it the old ones were lost."""
    script, module, out = tmp_path / "mine.py", tmp_path / "own_losses.py", tmp_path / "run"
    script.write_text(WITH_A_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def train(losses: str, batches: tiny.Walks) -> None:
        module.write_text(losses)
        sys.modules.pop("own_losses", None)
        importlib.invalidate_caches()
        mine = import_script(script)
        config = mine.Config()
        run = Run(out, config, script=script)
        fit(lambda rngs: Decoder(config.model, rngs=rngs), mine.loss, batches, config.training, run)

    def sources(step: int) -> dict[str, str]:
        history = json.loads((out / "identity.json").read_text())["history"]
        entry = [entry for entry in history if entry["first_step"] <= step][-1]
        return {path.name: path.read_text() for path in (out / entry["sources"]).iterdir()}

    with pytest.raises(tiny.Crash):
        train(LOSSES, tiny.Walks(crash_at=6))
    first = {row["step"]: row["grad_norm"] for row in read_metrics(out)}
    changed = LOSSES.replace("1.0 *", "2.0 *")
    train(changed, tiny.Walks())
    assert "(changed since: own_losses)" in " ".join(capfd.readouterr().err.split())
    for step, losses in ((1, LOSSES), (3, LOSSES), (4, changed), (8, changed)):
        assert sources(step) == {"mine.py": WITH_A_MODULE, "own_losses.py": losses, "tiny.py": TINY}
    norms = {row["step"]: row["grad_norm"] for row in read_metrics(out)}
    assert norms[3] == first[3]
    assert norms[4] == pytest.approx(2 * first[4], rel=1e-4)  # clipped afterwards: the first step that differs


def test_the_recipe_of_a_run_of_an_earlier_version_stays_too(script, tmp_path):
    out = made(script, tmp_path / "run", step=3)
    (out / "identity.json").write_text(json.dumps({"code": {"mine.py": "other"}, "inputs": {}}))
    script.write_text(SCRIPT.replace("SCALE = 1.0", "SCALE = 2.0"))
    Run(out, import_script(script).Config(), script=script).begin(4)
    first, second = json.loads((out / "identity.json").read_text())["history"]
    assert (first["first_step"], second["first_step"]) == (1, 4)
    assert (out / first["sources"] / "recipe.py").read_text() == SCRIPT
    assert "SCALE = 2.0" in (out / second["sources"] / "mine.py").read_text()


def test_a_run_that_goes_back_to_an_older_checkpoint_says_so(script, tmp_path):
    """A damaged checkpoint is left out; the steps after the one before are made again, by the code of now."""
    out = made(script, tmp_path / "run", step=3)
    Run(out, import_script(script).Config(), script=script).begin(1)
    Run(out, import_script(script).Config(), script=script).begin(3)
    script.write_text(SCRIPT.replace("SCALE = 1.0", "SCALE = 2.0"))
    Run(out, import_script(script).Config(), script=script).begin(4)
    Run(out, import_script(script).Config(), script=script).begin(2)
    assert [entry["first_step"] for entry in json.loads((out / "identity.json").read_text())["history"]] == [1, 2]


def test_an_edit_of_the_package_counts(unbroken, monkeypatch):
    Run(unbroken[0], tiny.Config())
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    with pytest.raises(RunError, match=r"was trained with other code \(changed since: efftrain\)"):
        Run(unbroken[0], tiny.Config())


def test_other_inputs_are_refused_and_those_that_are_gone_are_not(tmp_path):
    def run(**inputs: str) -> None:
        Run(tmp_path / "run", tiny.Config(), inputs=inputs)

    run(corpus="a", source="b")
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    run(corpus="a")
    with pytest.raises(
        RunError, match=r"with another input: the contents of corpus have changed; choose another --out"
    ):
        run(corpus="c")
    with pytest.raises(RunError, match="the contents of source have changed"):
        run(source="c")


def test_an_input_that_an_earlier_version_called_otherwise_counts(tmp_path):
    Run(tmp_path / "run", tiny.Config(), inputs={"training.branch": "one"})
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    Run(tmp_path / "run", tiny.Config(), inputs={"training.resume_from": "one"})
    with pytest.raises(RunError, match=r"the contents of training\.resume_from have changed"):
        Run(tmp_path / "run", tiny.Config(), inputs={"training.resume_from": "two"})


def test_a_run_of_an_earlier_version_goes_on(crashed, capfd):
    (crashed / "identity.json").unlink()
    Run(crashed, tiny.Config(), inputs={"corpus": "a"})
    assert "was started with other code" in " ".join(capfd.readouterr().err.split())
    assert json.loads((crashed / "identity.json").read_text())["inputs"] == {"corpus": "a"}
