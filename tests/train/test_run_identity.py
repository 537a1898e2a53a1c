"""A run of other code: it goes on with a warning while it is unfinished, and is refused when it is finished."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from efftrain import code_identity
from efftrain.errors import RunError
from efftrain.recipe import import_script
from efftrain.train.run import Run, load_model_config

SCRIPT = """
import sys
from dataclasses import dataclass
from pathlib import Path

from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.train.loop import Training
from efftrain.train.run import Run

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
    assert f"warning: {out} was begun by other code and continues with this one (changed since: mine.py)" in said
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
    with pytest.raises(RunError, match=r"was trained by other code \(changed since: mine\.py\); choose another --out"):
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
    assert code == 1
    assert "was trained by other code" in " ".join(said.split())


def test_an_edit_of_the_package_counts(unbroken, monkeypatch):
    Run(unbroken[0], tiny.Config())
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "another version")
    with pytest.raises(RunError, match=r"was trained by other code \(changed since: efftrain\)"):
        Run(unbroken[0], tiny.Config())


def test_other_inputs_are_refused_and_those_that_are_gone_are_not(tmp_path):
    def run(**inputs: str) -> None:
        Run(tmp_path / "run", tiny.Config(), inputs=inputs)

    run(corpus="a", source="b")
    run(corpus="a")
    with pytest.raises(RunError, match=r"from something else: what corpus names has changed; choose another --out"):
        run(corpus="c")
    with pytest.raises(RunError, match="what source names has changed"):
        run(source="c")


def test_a_run_of_an_earlier_version_goes_on(crashed, capfd):
    (crashed / "identity.json").unlink()
    Run(crashed, tiny.Config(), inputs={"corpus": "a"})
    assert "was begun by other code" in " ".join(capfd.readouterr().err.split())
    assert json.loads((crashed / "identity.json").read_text())["inputs"] == {"corpus": "a"}
