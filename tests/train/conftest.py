"""One unbroken tiny run, and one that crashed: what most tests of continuing compare with."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

CRASH_AT = 8  # this batch never comes: checkpoints of steps 3 and 6, metrics of at least six


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory) -> tuple[Path, tiny.TrainResult]:
    out = tmp_path_factory.mktemp("unbroken") / "run"
    return out, tiny.train(out)


@pytest.fixture(scope="session")
def crashed_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("crashed") / "run"
    with pytest.raises(tiny.Crash):
        tiny.train(out, tiny.Walks(crash_at=CRASH_AT))
    return out


@pytest.fixture
def crashed(crashed_run, tmp_path) -> Path:
    """A copy of the crashed run, to do with as one likes."""
    return Path(shutil.copytree(crashed_run, tmp_path / "run"))


@pytest.fixture
def ends_like(unbroken) -> Callable[[Path, tiny.TrainResult], None]:
    """Asserts that a run ended exactly as the unbroken one."""

    def check(out: Path, fitted: tiny.TrainResult) -> None:
        assert tiny.numbers(out) == tiny.numbers(unbroken[0])
        tiny.assert_same_parameters(fitted.model, unbroken[1].model)

    return check
