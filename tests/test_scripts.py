"""Scripts as a user writes and starts them: a mistake, or Ctrl-C, is one sentence, whatever the script wraps."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from efftrain.errors import ConfigError
from efftrain.models.config import llama
from efftrain.recipe import flag_hint, import_script
from efftrain.train.config import Training

ROOT = Path(__file__).parent.parent
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}

SLOW_BUILD = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from efftrain import data
from efftrain.data.stages.engines import Local
from efftrain.data.rules import AtMost

@dataclass(frozen=True, kw_only=True)
class Slow(AtMost):
    name: ClassVar[str] = "slow"
    threshold: float = 1.0

    def score(self, text):
        Path("started").touch()
        time.sleep(60)
        return 0.0

def main(processes):
    source = data.TextFolder(path=Path("texts"), pattern="*.txt")
    config = data.CorpusConfig(sources=(source,), rules=(Slow(),), vocabulary=300)
    data.build(config, Path("corpus"), engine=Local(processes=processes))

if __name__ == "__main__":
    main(int(sys.argv[1]))
"""


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment,
    )


MAIN = "\nfrom efftrain.recipe import run_recipe\nif __name__ == '__main__': run_recipe(lambda config: None, configs)\n"


@pytest.mark.parametrize("end", ["", MAIN], ids=["bare", "run_recipe"])
@pytest.mark.smoke
def test_a_configuration_that_is_wrong_while_its_script_is_read_is_one_sentence_with_its_line(end, tmp_path):
    script = tmp_path / "mine.py"
    script.write_text("from efftrain.models.config import Dense\n\nconfigs = {'cpu': Dense(d_ff=0)}\n" + end)
    done = run(script)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: mlp.d_ff is 0; it must be at least 1 ({script}, line 3)\n"


def test_a_mistake_in_a_script_that_wraps_nothing_is_one_sentence(tmp_path):
    script = tmp_path / "bare.py"
    script.write_text("from pathlib import Path\nfrom efftrain import data\ndata.open(Path('nowhere'))\n")
    done = run(script)
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no corpus nowhere")
    assert len(done.stderr.splitlines()) == 1


def test_a_script_that_is_not_named_like_one_is_one_sentence(tmp_path):
    (tmp_path / "recipe.txt").write_text("configs = {}")
    with pytest.raises(ConfigError, match=r"give the path of a \.py file"):
        import_script(tmp_path / "recipe.txt")


def test_another_error_keeps_its_traceback(tmp_path):
    script = tmp_path / "bug.py"
    script.write_text("import efftrain.errors\nraise ValueError('a bug')\n")
    done = run(script)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: a bug" in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_corpus_build_says_in_one_line_what_is_kept_and_how_to_go_on(processes, tmp_path):
    (tmp_path / "build.py").write_text(SLOW_BUILD)
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text number {number}\n" * 50)
    process = subprocess.Popen(
        [sys.executable, "build.py", str(processes)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A background job of a shell ignores SIGINT, and what it starts inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "started").exists() and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
        output, _ = process.communicate(timeout=30)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        "interrupted; the completed parts are kept in corpus.incomplete, and the same command continues from there"
    )
    assert (tmp_path / "corpus.incomplete").is_dir()


def test_ctrl_c_in_any_command_is_one_line_and_code_130():
    program = (
        "from efftrain.recipe import exit_cleanly\nimport signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with exit_cleanly(): signal.raise_signal(signal.SIGINT)"
    )
    done = run("-c", program)
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted; the same command continues")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "efftrain.cli", "--help"],
        ["-m", "efftrain.cli", "compress", "--help"],
        ["-m", "efftrain.cli", "nonsense"],
        [ROOT / "recipes" / "dense.py", "--help"],
        [ROOT / "data" / "python.py", "--nonsense", "1"],
    ],
    ids=["help", "help-of-a-verb", "unknown-verb", "help-of-a-recipe", "unknown-flag"],
)
def test_help_and_complaints_are_ascii_where_the_locale_is(command):
    done = run(*command, **ASCII)
    assert done.returncode == (0 if "--help" in command else 2), done.stderr
    assert "Traceback" not in done.stderr
    assert "\\u" not in done.stdout + done.stderr  # box characters have their like in ASCII
    assert len(done.stdout + done.stderr) > 100


def test_reports_are_ascii_where_the_locale_is():
    """The characters that tables, units and texts of ours are made of; anything else is an escape."""
    program = (
        "from rich.console import Console\n"
        "from efftrain.progress import write_in_any_locale\n"
        "from efftrain.measure.scorecard.scorecard import Figure, Scorecard, table\n"
        "write_in_any_locale()\n"
        "card = Scorecard('small', {'decode': Figure(3e-6, 's', 'measured', 'caf\\u00e9')}, {})\n"
        "Console().print(table([card]))"
    )
    done = run("-c", program, **ASCII)
    assert done.returncode == 0, done.stderr
    assert "3 us" in done.stdout
    assert "caf\\xe9" in done.stdout


@pytest.mark.parametrize(("code", "arguments"), [(0, ["--version"]), (2, ["--versions"])])
def test_version(code, arguments):
    done = run("-m", "efftrain.cli", *arguments)
    assert done.returncode == code
    if code == 0:
        assert done.stdout == "efftrain 0.1.0\n"


@dataclass(frozen=True)
class Config:
    model: object
    rows: int = 3


def test_an_unknown_flag_is_answered_with_the_flags_in_its_place():
    config = Config(llama(vocab_size=8, d_model=8, n_layers=2, n_heads=2, d_ff=8, max_length=8))
    hint = flag_hint(config, "--model.n-layers")
    assert "follows from other fields (``n_repeats`` times the blocks of ``pattern``" in hint
    assert "--model.n-repeats" in hint
    assert flag_hint(config, "--steps") == "there is no flag --steps; the flags are: --model, --rows"
    assert "--model.pattern.0.mlp.d-ff" in flag_hint(config, "--model.pattern.0.mlp.width")
    for known in ("--rows", "--model.n-repeats", "--model.n_repeats", "--model.no-scan", "--help", "--other.rows"):
        assert flag_hint(config, known) is None


def test_an_old_flag_is_answered_with_the_new_one():
    training = Training(steps=1, batch_size=1, length=1)
    assert flag_hint(training, "--branch-schedule") == "--branch-schedule is now called --resume-schedule"
    assert flag_hint(Config(training), "--model.branch") == "--model.branch is now called --model.resume-from"


def test_a_recipe_gives_the_hint_after_its_complaint():
    done = run(ROOT / "recipes" / "dense.py", "cpu", "--model.n-layers=8")
    assert done.returncode == 2
    assert "--model.n-layers follows from other fields" in done.stderr
    assert "--model.n-repeats" in done.stderr
