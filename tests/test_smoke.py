"""``pytest -m smoke`` is a minute that touches every room."""

from pathlib import Path

TESTS = Path(__file__).parent
ROOMS = {"data", "ops", "models", "sharding", "train", "compress", "measure", "interop", "recipes", "tpu"}


def test_every_room_has_a_test_in_the_smoke_set():
    mark = f"@pytest.mark.{'smoke'}\n"
    marked = {path.parent.name for path in TESTS.rglob("test_*.py") if mark in path.read_text()}
    assert marked >= ROOMS
    assert {path.name for path in TESTS.iterdir() if list(path.glob("test_*.py"))} - {"forks", "aot"} == ROOMS
