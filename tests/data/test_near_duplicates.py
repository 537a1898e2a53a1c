"""Near duplicates as a build removes them: scope, choice of the survivor, and the canary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data.canary import plant
from efftrain.data.engines import Local
from efftrain.data.near_duplicates import diff
from efftrain.data.rules import AtLeast
from efftrain.data.shingles import shingles
from efftrain.data.splits import SPLITS

WORDS = 120


@dataclass(frozen=True, kw_only=True)
class Beauty(AtLeast):
    """The number behind the word ``beauty``."""

    name: ClassVar[str] = "beauty"
    limit: float = 0.0

    def score(self, text):
        return float(text.text.rsplit("beauty", 1)[1])


def write(path: Path, texts: dict[str, str]) -> data.JsonLines:
    path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
    return data.JsonLines(path=path, id_field="id")


@pytest.fixture
def base() -> dict[str, str]:
    """Forty texts that share nothing."""
    rng = np.random.default_rng(0)
    return {f"{n:02d}": " ".join(f"w{w}" for w in rng.integers(0, 10**9, WORDS)) for n in range(40)}


def build(tmp_path, sources, **changes):
    fields = {"rules": (), "vocabulary": 300, "near_duplicates": data.MinHash(), "decontaminate": None} | changes
    return data.build(data.CorpusConfig(sources=sources, **fields), tmp_path / "out", engine=Local(processes=1))


def kept(corpus) -> set[str]:
    return {d.id for split in SPLITS for d in corpus.documents(split)}


@pytest.mark.parametrize(("within", "n_copies"), [("corpus", 0), ("source", 1)])
def test_duplicates_in_another_source_stay_where_the_scope_is_the_source(tmp_path, base, within, n_copies):
    here = write(tmp_path / "here.jsonl", base | {"same source": base["01"] + " end"})
    there = write(tmp_path / "there.jsonl", {"other source": base["00"] + " end"})
    corpus = build(tmp_path, (here, there), near_duplicates=data.MinHash(within=within))
    found = kept(corpus)
    assert len({"01", "same source"} & found) == 1
    assert len({"00", "other source"} & found) == 1 + n_copies


def test_the_longest_stays_by_default(tmp_path, base):
    texts = base | {"longer": base["00"] + " one two three", "shorter": " ".join(base["00"].split()[:-3])}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),))
    assert {"longer", "00", "shorter"} & kept(corpus) == {"longer"}


def test_the_best_by_quality_stays(tmp_path, base):
    texts = {id: f"{text} beauty 0.5" for id, text in base.items()}
    texts |= {"longer": base["00"] + " one two three beauty 0.1", "better": base["00"] + " beauty 0.9"}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),), rules=(Beauty(),), quality="beauty")
    assert {"longer", "00", "better"} & kept(corpus) == {"better"}


def test_of_equals_the_smaller_id_stays(tmp_path, base):
    swapped = base["00"].split()
    swapped[60], swapped[61] = swapped[61], swapped[60]
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", base | {"0": " ".join(swapped)}),))
    assert {"0", "00"} & kept(corpus) == {"0"}


def test_a_chain_does_not_remove_what_is_unlike_the_survivor(tmp_path, base):
    """Each text is like its neighbours, the ends are not alike: the ends stay."""
    words, chain = base["00"].split(), {}
    for link in range(5):
        chain[f"link{link}"] = " ".join([f"new{n}" for n in range(12 * link)] + words[12 * link :])
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", {k: v for k, v in base.items() if k != "00"} | chain),))
    rows = [r for r in pq.read_table(corpus.path / "removed.parquet").to_pylist() if r["rule"] == "near_duplicate"]
    assert rows
    assert len({"link0", "link4"} & kept(corpus)) == 2
    for row in rows:
        a, b = ({*shingles(chain[row[key]].encode(), 5)} for key in ("id", "survivor"))
        assert len(a & b) / len(a | b) >= 0.75


def test_datasketchs_own_hash_finds_the_same(tmp_path, base):
    texts = base | {f"copy{n}": base[f"{n:02d}"] + " more" for n in range(10)}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),), near_duplicates=data.MinHash(hash="sha1"))
    assert kept(corpus) == {id for id in texts if id not in {f"{n:02d}" for n in range(10)}}


def test_the_canary_notices_bands_that_find_nothing(tmp_path, base, capfd):
    """One band of all rows: only equal sets of shingles share it."""
    deaf = data.MinHash(bands=1)
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", base),), near_duplicates=deaf)
    canary = corpus.manifest["near_duplicates"]["canary"]
    assert canary["found"] < 0.5 * canary["planted"]  # what has no word replaced is found
    assert "planted duplicates only" in capfd.readouterr().err


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9, 0.975])
def test_a_planted_copy_has_the_similarity_that_was_asked(base, similarity):
    text = " ".join(base.values()).encode()
    copy = plant(text, similarity, 5, np.random.default_rng(0))
    a, b = ({*shingles(t, 5)} for t in (text, copy))
    assert len(a & b) / len(a | b) == pytest.approx(similarity, abs=0.01)


def test_documents_without_words_are_no_duplicates(tmp_path, base):
    texts = base | {"a": "!!! ???", "b": "--- ;;;", "c": "... \0 ,,,"}
    assert {"a", "b", "c"} <= kept(build(tmp_path, (write(tmp_path / "a.jsonl", texts),)))


def test_a_diff_is_short_whatever_the_texts():
    shown = diff(b"same\n" + b"x" * 10**6, b"same\n" + b"y" * 10**6)
    assert "-x" in shown
    assert len(shown) <= 2000
