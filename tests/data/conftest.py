"""A small corpus that the tests of store and loader share."""

from pathlib import Path

import numpy as np
import pytest

from efftrain import data
from efftrain.data.splits import SplitByGroup

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "über", "naïve", "数据", "return", "def", "class"]


def _write_documents(folder: Path, n: int = 90, groups: int = 15, seed: int = 0) -> Path:
    """n distinct texts in ``groups`` folders."""
    rng = np.random.default_rng(seed)
    for number in range(n):
        words = rng.choice(WORDS, size=int(rng.integers(20, 200)))
        path = folder / f"p{number % groups:02d}" / f"doc{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {number}\n" + " ".join(words) + "\n", encoding="utf-8")
    return folder


def _config_for(folder: Path, **changes) -> data.CorpusConfig:
    fields = {
        "sources": (data.TextFolder(path=folder, group_by_folder=True),),
        "rules": (),
        "vocabulary": 300,
        "block": 64,
        "shard_bytes": 10_000,
        "split": SplitByGroup(validation=0.15, test=0.15),
    }
    return data.CorpusConfig(**(fields | changes))


@pytest.fixture(scope="session")
def write_documents():
    return _write_documents


@pytest.fixture(scope="session")
def config_for():
    return _config_for


@pytest.fixture(scope="session")
def documents(tmp_path_factory) -> Path:
    return _write_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, documents) -> data.Corpus:
    """Built once; tests that change a corpus copy it first."""
    return data.build(_config_for(documents), tmp_path_factory.mktemp("corpora") / "small")
