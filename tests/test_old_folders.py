"""What commit 4f30595 left on disk opens today and holds the same: a corpus, a teacher cache, scores, compressed runs.

``made_by_4f30595.tar.xz`` holds the folders, the texts that the corpus was built from, and in ``expected.npz`` what
that commit read from them. A run that it was still training: train/test_old_run.py.
"""

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest

import efftrain
from efftrain import data
from efftrain.data.documents import Text
from efftrain.data.loading.loader import PackedRows
from efftrain.data.rules import TooShort
from efftrain.data.rules.score_table import ScoreTable
from efftrain.data.splits import SplitByGroup
from efftrain.data.storage.teacher_cache import TeacherCache
from efftrain.errors import CorpusError
from efftrain.models.zeros import zeros_share


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).with_name("made_by_4f30595.tar.xz")) as archive:
        archive.extractall(folder, filter="data")
    return folder / "made_by_4f30595"


@pytest.fixture(scope="module")
def expected(old) -> dict[str, np.ndarray]:
    return dict(np.load(old / "expected.npz"))


@pytest.fixture(scope="module")
def corpus(old) -> data.Corpus:
    return data.open(old / "corpus", verify=True)


def test_a_corpus_holds_the_same_documents_and_tokens(corpus, expected):
    assert list(corpus.splits) == ["train", "validation", "test"]
    for split in corpus.splits:
        np.testing.assert_array_equal(corpus.tokens(split)[:], expected[f"tokens_{split}"])
    assert [d.id for split in corpus.splits for d in corpus.documents(split)] == list(expected["ids"])
    removed = {row["stage"]: row["documents"] for row in corpus.filter_statistics}
    assert removed == {"seen": 41, "exact_duplicate": 1, "kept": 40}


def test_a_corpus_is_not_taken_for_one_that_the_code_of_today_would_build(corpus, old, monkeypatch):
    monkeypatch.chdir(old.parent)
    config = data.CorpusConfig(
        sources=(data.TextFolder(path=Path("text")),),
        rules=(TooShort(threshold=15),),
        near_duplicates=data.MinHash(),
        vocabulary=280,
        block=64,
        split=SplitByGroup(validation=0.2, test=0.1),
    )
    before = digests(corpus.path)
    with pytest.raises(CorpusError, match="overwrite"):
        data.build(config, corpus.path)
    assert digests(corpus.path) == before


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_teacher_cache_gives_the_same_predictions(corpus, old, expected):
    cache = TeacherCache.open(old / "cache", verify=True)
    cache.check_corpus(corpus, "train", 16)
    read = cache.read(0, PackedRows(corpus, "train", 16)[0])
    for name, values in read.items():
        np.testing.assert_array_equal(values, expected[f"cache_{name}"])
    assert len(cache) == 8


def test_scores_still_filter(corpus, old):
    table = ScoreTable.load(old / "scores.parquet")
    assert all(0 < table.score(Text(document.text, document.id)) < 100 for document in corpus.documents("validation"))
    with pytest.raises(CorpusError, match="stranger"):
        table.score(Text("not scored", "stranger"))


@pytest.mark.filterwarnings("ignore:efftrain.* is now:DeprecationWarning")
@pytest.mark.parametrize("name", ["run", "int4", "sparse", "slim", "forked"])
def test_a_model_computes_the_same_logits(old, expected, name):
    model = efftrain.load(old / name)
    logits = np.asarray(model(expected["prompt"]))[:, -1]
    np.testing.assert_allclose(logits, expected[f"logits_{name}"], rtol=1e-4, atol=1e-4)
    assert np.abs(logits - expected["logits_run"]).max() > 0.01 or name == "run"
    if name == "sparse":
        assert zeros_share(model) == pytest.approx(0.5, abs=0.01)
