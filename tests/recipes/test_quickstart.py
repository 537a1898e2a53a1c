"""What the quickstart shows of its model."""

from pathlib import Path

import pytest

from efftrain.recipe import import_script

PROMPT = "def read_json(path):\n"


@pytest.fixture(scope="module")
def quickstart():
    return import_script(Path(__file__).parents[2] / "recipes" / "quickstart.py")


@pytest.mark.parametrize(
    ("drawn", "shown"),
    [
        ("    return path\n\ndef f(x):\n    retur", "    return path"),
        ("    if path:\n        return 1\n    else\n", "    if path:\n        return 1"),
        ("return path\nx = 1\n", None),
        ("    '''never closed\n    return path\n", None),
        ("    x = '\0'\n    y\n", None),
        ("    return pa", None),
        ("", None),
    ],
)
@pytest.mark.smoke
def test_a_sample_is_shown_as_far_as_it_is_python(quickstart, drawn, shown):
    assert quickstart.PROMPT == PROMPT
    assert quickstart.python_code(PROMPT + drawn) == ("" if shown is None else PROMPT + shown)
