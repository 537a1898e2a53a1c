"""Near duplicates as a build removes them: scope, choice of the survivor, and the canary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data.dedup import near_duplicates
from efftrain.data.dedup.canary import edited_copy
from efftrain.data.dedup.lsh import BucketStats
from efftrain.data.dedup.near_duplicates import diff
from efftrain.data.dedup.shingles import shingles
from efftrain.data.rules import AtLeast, AtMost, Between
from efftrain.data.splits import SPLITS
from efftrain.data.stages.engines import Local
from efftrain.errors import ConfigError

WORDS = 120


@dataclass(frozen=True, kw_only=True)
class Beauty(AtLeast):
    """The number after the word ``beauty``."""

    name: ClassVar[str] = "beauty"
    threshold: float = 0.0

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
    corpus = build(tmp_path, (here, there), within=within)
    found = kept(corpus)
    assert len({"here.jsonl:01", "here.jsonl:same source"} & found) == 1
    assert len({"here.jsonl:00", "there.jsonl:other source"} & found) == 1 + n_copies


@pytest.mark.parametrize(("within", "n_copies"), [("corpus", 0), ("source", 1)])
def test_the_scope_holds_for_repeats_and_lines_too(tmp_path, base, within, n_copies):
    line = "a notice that stands below every page of the site"
    here = write(tmp_path / "here.jsonl", base | {"twice": base["01"], "page": f"{line}\nfirst words of one page"})
    there = write(tmp_path / "there.jsonl", {"copy": base["00"], "page": f"{line}\nother words of another page"})
    lines = data.LineDeduplication(min_chars=30)
    corpus = build(tmp_path, (here, there), within=within, near_duplicates=None, line_deduplication=lines)
    texts = {d.id: d.text for split in SPLITS for d in corpus.documents(split)}
    assert len({"here.jsonl:01", "here.jsonl:twice"} & texts.keys()) == 1
    assert len({"here.jsonl:00", "there.jsonl:copy"} & texts.keys()) == 1 + n_copies
    assert sum(line in text for text in texts.values()) == 1 + n_copies


@pytest.mark.smoke
def test_a_copy_with_one_word_changed_is_found_where_lines_are_removed_too(tmp_path, base):
    """Taking the shared lines out first would leave of the copy its one changed line, and nothing to know it by."""
    lines = [" ".join(base["00"].split()[start : start + 12]) for start in range(0, WORDS, 12)]
    changed = "\n".join([*lines[:4], lines[4].replace(lines[4].split()[6], "other"), *lines[5:]])
    texts = {k: v for k, v in base.items() if k != "00"} | {"original": "\n".join(lines), "copy": changed}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),), line_deduplication=data.LineDeduplication())
    found = {d.id: d.text for split in SPLITS for d in corpus.documents(split)}
    assert len({"original", "copy"} & found.keys()) == 1
    assert found.get("original", found.get("copy")) in ("\n".join(lines), changed)


def test_the_longest_stays_by_default(tmp_path, base):
    texts = base | {"longer": base["00"] + " one two three", "shorter": " ".join(base["00"].split()[:-3])}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),))
    assert {"longer", "00", "shorter"} & kept(corpus) == {"longer"}


def test_the_best_by_quality_stays(tmp_path, base):
    texts = {id: f"{text} beauty 0.5" for id, text in base.items()}
    texts |= {"longer": base["00"] + " one two three beauty 0.1", "better": base["00"] + " beauty 0.9"}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),), rules=(Beauty(),), quality="beauty")
    assert {"longer", "00", "better"} & kept(corpus) == {"better"}


@dataclass(frozen=True, kw_only=True)
class Ugliness(AtMost):
    """The number after the word ``beauty``; less is better."""

    name: ClassVar[str] = "ugliness"
    threshold: float = 1.0

    score = Beauty.score


@dataclass(frozen=True, kw_only=True)
class Moderation(Between):
    """Neither much nor little is better."""

    name: ClassVar[str] = "moderation"
    low: float = 0.0
    high: float = 1.0

    score = Beauty.score


def test_the_best_is_the_least_where_less_is_better(tmp_path, base):
    texts = {id: f"{text} beauty 0.5" for id, text in base.items()}
    texts |= {"longer": base["00"] + " one two three beauty 0.1", "worse": base["00"] + " beauty 0.9"}
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", texts),), rules=(Ugliness(),), quality="ugliness")
    assert {"longer", "00", "worse"} & kept(corpus) == {"longer"}


def test_a_quality_that_prefers_neither_end_is_refused(tmp_path, base):
    source = write(tmp_path / "a.jsonl", {id: f"{text} beauty 0.5" for id, text in base.items()})
    with pytest.raises(ConfigError, match=r"corpus\.quality is 'moderation', which prefers neither"):
        build(tmp_path, (source,), rules=(Moderation(),), quality="moderation")


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


def random_signatures(texts, config):
    return np.random.default_rng(len(texts)).integers(0, 1 << 32, (len(texts), config.n_permutations), np.uint32)


def bands_of_their_own(signed, bands, salt):
    return np.arange(bands * len(signed), dtype=np.uint64).reshape(bands, -1)


def no_edges(hashes, numbers, max_bucket):
    return np.empty((0, 2), np.int64), BucketStats(0, 0, 0, 0)


BROKEN = {
    "sign": random_signatures,
    "band_hashes": bands_of_their_own,
    "band_edges": no_edges,
    "components": lambda edges: (np.empty(0, np.int64), np.empty(0, np.int64)),
    "leaders": lambda *_: [],
    "shingle_set": lambda text, n: np.empty(0, np.uint64),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_canary_notices_each_broken_stage(tmp_path, base, capfd, monkeypatch, name):
    monkeypatch.setattr(near_duplicates, name, BROKEN[name])
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", base | {"copy": base["00"] + " more"}),))
    canary = corpus.manifest["near_duplicates"]["canary"]
    assert canary["planted"] > 50
    assert canary["found"] == 0
    assert "planted duplicates only 0 were found" in " ".join(capfd.readouterr().err.split())


def test_planted_pairs_are_no_part_of_the_corpus(tmp_path, base):
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", base | {"copy": base["00"] + " more"}),))
    canary = corpus.manifest["near_duplicates"]["canary"]
    assert canary["found"] >= 0.9 * canary["planted"] > 50
    assert corpus.manifest["sources"].keys() == {"a.jsonl"}
    assert corpus.manifest["near_duplicates"]["removed"] == corpus.manifest["near_duplicates"]["clusters"] == 1
    assert kept(corpus) == {*base, "copy"} - {"00"}
    assert pq.read_table(corpus.path / "removed.parquet")["id"].to_pylist() == ["00"]


def test_the_canary_notices_bands_that_find_nothing(tmp_path, base, capfd):
    """One band of all rows: only equal sets of shingles share it."""
    deaf = data.MinHash(bands=1)
    corpus = build(tmp_path, (write(tmp_path / "a.jsonl", base),), near_duplicates=deaf)
    canary = corpus.manifest["near_duplicates"]["canary"]
    assert canary["found"] < 0.5 * canary["planted"]  # what has no word replaced is found
    assert "planted duplicates only" in capfd.readouterr().err


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.9, 0.975])
def test_a_planted_copy_has_the_similarity_that_was_asked(base, similarity):
    found = " ".join(base.values()).encode().split()
    copy = edited_copy(found, similarity, 5, np.random.default_rng(0))
    a, b = ({*shingles(b" ".join(t), 5)} for t in (found, copy))
    assert len(a & b) / len(a | b) == pytest.approx(similarity, abs=0.01)


def test_documents_without_words_are_no_duplicates(tmp_path, base):
    texts = base | {"a": "!!! ???", "b": "--- ;;;", "c": "... \0 ,,,"}
    assert {"a", "b", "c"} <= kept(build(tmp_path, (write(tmp_path / "a.jsonl", texts),)))


def test_a_diff_is_short_whatever_the_texts():
    shown = diff(b"same\n" + b"x" * 10**6, b"same\n" + b"y" * 10**6)
    assert "-x" in shown
    assert len(shown) <= 2000
