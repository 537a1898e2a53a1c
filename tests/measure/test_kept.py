"""What was measured is taken again for the same values and the same code only, and the user is told."""

import json

import pytest
from lock_holder import Holder

from efftrain.errors import InUseError
from efftrain.lock import beside
from efftrain.measure.measurements import Measurements

VALUES, CODE = {"options": {"rows": (1, 2)}, "model": "a"}, {"efftrain": "1", "recipe.py": "x"}


def measured(path, values=VALUES, code=CODE):
    return Measurements(path, values, code).cell("first", lambda: 3.0)


def test_what_was_measured_is_not_measured_again(tmp_path, capfd):
    path = tmp_path / "depth.json"
    assert measured(path) == 3.0
    assert Measurements(path, VALUES, CODE).cell("first", lambda: 4.0) == 3.0
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "code", "words"),
    [
        (VALUES, CODE | {"recipe.py": "y"}, "other code (changed since: recipe.py); measuring again"),
        (VALUES, {"efftrain": "2"}, "other code (changed since: efftrain, recipe.py); measuring again"),
        (VALUES | {"model": "b"}, CODE, "other options or inputs (model: 'a' -> 'b'); measuring again"),
    ],
)
def test_other_code_and_other_values_are_measured_again(tmp_path, capfd, values, code, words):
    path = tmp_path / "depth.json"
    measured(path)
    assert Measurements(path, values, code).cell("first", lambda: 4.0) == 4.0
    assert words in " ".join(capfd.readouterr().err.split())


def test_what_an_earlier_version_left_is_of_other_code(tmp_path):
    path = tmp_path / "depth.json"
    (tmp_path / ".depth.json.incomplete").write_text(json.dumps(VALUES | {"cells": {"first": 9.0}}))
    assert measured(path) == 3.0


def test_two_processes_do_not_measure_for_one_file(tmp_path):
    path = tmp_path / "runs" / "depth.json"
    holder = Holder(beside(path), path)
    with pytest.raises(InUseError, match=rf"depth.json is in use by process {holder.pid} on \S+; wait for it"):
        measured(path)
    holder.kill()
    kept = Measurements(path, VALUES, CODE)
    assert kept.cell("first", lambda: 3.0) == 3.0
    kept.remove()
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b'{"options": {"ro', b"\xff", b"[1]", b'{"cells": 3}', b"[" * 100_000])
def test_damaged_measurements_are_set_aside_and_made_again(tmp_path, capfd, content):
    (tmp_path / ".depth.json.incomplete").write_bytes(content)
    assert measured(tmp_path / "depth.json") == 3.0
    assert (tmp_path / ".depth.json.incomplete.damaged").read_bytes() == content
    assert "is damaged and is now" in " ".join(capfd.readouterr().err.split())
