"""A corpus, its scores and an interrupted build are never taken for those of other code."""

import json
import os
import sys

import pytest

from efftrain import code_identity, data
from efftrain.class_names import SCRIPT_PREFIX
from efftrain.data.sources import base as sources
from efftrain.data.stages.engines import Local
from efftrain.data.storage import inputs
from efftrain.errors import CorpusError
from efftrain.recipe import import_script

RULE = """
from dataclasses import dataclass
from efftrain.data.rules import AtMost

@dataclass(frozen=True, kw_only=True)
class Number(AtMost):
    name = "number"
    threshold: float = 15.0

    def score(self, text):
        return float(text.text.split()[1])
"""
LOSES_ALL_BUT_FIVE = RULE.replace("return float(text.text.split()[1])", "return 3.0 * float(text.text.split()[1])")
RAISES = RULE.replace("return float", "assert text.text.split()[1] != '25'\n        return float")


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n} of these"}) + "\n" for n in range(30)))
    return path


@pytest.fixture
def config(tmp_path, texts):
    """A function from the source of a rule to a configuration with it."""
    yield lambda source: data.CorpusConfig(
        sources=(data.JsonLines(path=texts),), rules=(imported(tmp_path, source).Number(),), vocabulary=300
    )
    sys.modules.pop(SCRIPT_PREFIX + "mine", None)


def imported(folder, source):
    (folder / "mine.py").write_text(source)
    return import_script(folder / "mine.py")


def n_kept(corpus):
    return corpus.filter_statistics[-1]["documents"]


def test_a_changed_rule_is_not_up_to_date(config, tmp_path):
    corpus = data.build(config(RULE), tmp_path / "out")
    assert n_kept(corpus) == 16
    with pytest.raises(CorpusError, match=r"the code of mine\.py has changed.*--overwrite"):
        data.build(config(LOSES_ALL_BUT_FIVE), tmp_path / "out")
    assert data.build(config(RULE), tmp_path / "out").manifest == corpus.manifest


def test_a_changed_rule_scores_again(config, tmp_path):
    data.build(config(RULE), tmp_path / "out")
    assert n_kept(data.build(config(LOSES_ALL_BUT_FIVE), tmp_path / "out", overwrite=True)) == 6


def test_an_interrupted_build_does_not_go_on_with_pieces_of_other_code(config, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sources, "RANGE_BYTES", 100)
    with pytest.raises(CorpusError, match="'number' failed on"):
        data.build(config(RAISES), tmp_path / "out", engine=Local(processes=1))
    done = [*(tmp_path / "out.incomplete" / "work" / "read").glob("*.json")]
    assert len(done) > 5
    corpus = data.build(config(LOSES_ALL_BUT_FIVE), tmp_path / "out", engine=Local(processes=1))
    assert n_kept(corpus) == 6
    assert "starting again" in capfd.readouterr().err


def test_an_edit_of_the_package_is_another_state(config, tmp_path, monkeypatch):
    """Also where no commit was made, or one more edit in a tree that was dirty before."""
    data.build(config(RULE), tmp_path / "out")
    monkeypatch.setattr(code_identity, "package_identity", lambda rooms: "0.1.0 another")
    with pytest.raises(CorpusError, match="the code of efftrain has changed"):
        data.build(config(RULE), tmp_path / "out")


def test_a_source_of_ones_own_counts_too(tmp_path, texts):
    source = (
        "from efftrain import data\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(data.JsonLines):\n    WORDS = 3\n"
    )
    build = lambda source: data.build(  # noqa: E731
        data.CorpusConfig(sources=(imported(tmp_path, source).Mine(path=texts),), rules=(), vocabulary=300),
        tmp_path / "out",
    )
    build(source)
    with pytest.raises(CorpusError, match=r"the code of mine\.py"):
        build(source.replace("3", "4"))


def test_one_engine_serves_several_builds(config, tmp_path, monkeypatch):
    """Its workers outlive a build, and know neither the rule of the next one nor that its folder has the same name."""
    monkeypatch.setattr(sources, "RANGE_BYTES", 100)
    engine = Local(processes=2)
    try:
        first = data.build(config(RULE), tmp_path / "out", engine=engine)
        second = data.build(config(LOSES_ALL_BUT_FIVE), tmp_path / "out", engine=engine, overwrite=True)
        assert (n_kept(first), n_kept(second)) == (16, 6)
    finally:
        engine.close()


def test_an_engine_of_the_callers_stays_open(config, tmp_path):
    class Watched(Local):
        closed = 0

        def close(self):
            self.closed += 1
            super().close()

    engine = Watched(processes=1)
    data.build(config(RULE), tmp_path / "out", engine=engine)
    assert engine.closed == 0


def test_files_that_did_not_change_are_not_read_again(config, tmp_path, texts, monkeypatch):
    monkeypatch.setattr(inputs, "_SETTLED_NS", 0)
    data.build(config(RULE), tmp_path / "out")
    read = []
    digest = inputs.file_digest
    monkeypatch.setattr(inputs, "file_digest", lambda path: read.append(path) or digest(path))
    data.build(config(RULE), tmp_path / "out")
    assert read == []
    times = texts.stat()
    texts.write_text(texts.read_text().replace("document 3", "document 4"))
    os.utime(texts, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time of content
    with pytest.raises(CorpusError, match=r"inputs\[0\]\.blake2b"):
        data.build(config(RULE), tmp_path / "out")
    assert read == [texts]


def test_a_file_that_changed_a_moment_ago_is_read_again(texts):
    files = [("texts", [("texts.jsonl", texts)])]
    first = inputs.fingerprints(files)
    assert first[0]["status"] == ""
    texts.write_text(texts.read_text().replace("document 3", "document 4"))
    assert inputs.fingerprints(files, first)[0]["blake2b"] != first[0]["blake2b"]


def open_files():
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.exists(link)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are listed in /proc")
def test_nothing_is_left_open(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "RANGE_BYTES", 100)
    for number in range(2):
        changed = data.CorpusConfig(**{**vars(config(RULE)), "near_duplicates": data.MinHash(), "seed": number})
        data.build(changed, tmp_path / f"out{number}", engine=Local(processes=1))
    with open("/proc/self/maps") as maps:
        assert "out1.incomplete" not in maps.read()
    assert not [path for path in open_files() if "out1" in path]
