from pathlib import Path

import pytest
from texts import build_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return build_corpus(tmp_path_factory.mktemp("texts") / "small")
