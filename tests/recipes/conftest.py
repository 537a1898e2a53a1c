import sys
from pathlib import Path

import pytest
from texts import build_corpus

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("data", "models", "interop")]  # chat_runs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("texts") / "small")
