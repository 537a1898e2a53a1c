"""What was measured is taken again for the same values and the same code only, and the user is told."""

import json

import pytest

from efftrain.measure.kept import Kept

VALUES, CODE = {"options": {"rows": (1, 2)}, "model": "a"}, {"efftrain": "1", "recipe.py": "x"}


def measured(path, values=VALUES, code=CODE):
    return Kept(path, values, code).cell("first", lambda: 3.0)


def test_what_was_measured_is_not_measured_again(tmp_path, capfd):
    path = tmp_path / "depth.json"
    assert measured(path) == 3.0
    assert Kept(path, VALUES, CODE).cell("first", lambda: 4.0) == 3.0
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
    assert Kept(path, values, code).cell("first", lambda: 4.0) == 4.0
    assert words in " ".join(capfd.readouterr().err.split())


def test_what_an_earlier_version_left_is_of_other_code(tmp_path):
    path = tmp_path / "depth.json"
    (tmp_path / ".depth.json.incomplete").write_text(json.dumps(VALUES | {"cells": {"first": 9.0}}))
    assert measured(path) == 3.0
