"""A clean corpus with planted near duplicates and junk: what curation finds, and what it costs."""

import json
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data.dedup.lsh import collision_probability
from efftrain.data.dedup.shingles import shingles
from efftrain.data.rules import FineWeb, Gopher, GopherRepetition
from efftrain.data.splits import SPLITS
from efftrain.data.stages.engines import Local

N_CLEAN, N_JUNK = 500, 100


def english(rng: np.random.Generator) -> Iterator[str]:
    """Endless sentences in the manner of Python's manual, which lies beside every interpreter: a Markov chain."""
    from pydoc_data.topics import topics

    words = [word for text in topics.values() for word in text.split() if re.fullmatch("[A-Za-z]+[.,]?", word)]
    follows = defaultdict(list)
    for a, b, c in zip(words, words[1:], words[2:], strict=False):
        follows[a, b].append(c)
    pairs = list(follows)
    while True:
        pair = pairs[rng.integers(len(pairs))]
        text = list(pair)
        for _ in range(int(rng.integers(100, 250))):
            # Now and then somewhere else, or a text would repeat what it follows.
            known = pair in follows and rng.random() > 0.2
            pair = (pair[1], rng.choice(follows[pair])) if known else pairs[rng.integers(len(pairs))]
            text.append(str(pair[1]))
        lines = [" ".join(text[start : start + 12]) + "." for start in range(0, len(text), 12)]
        yield "\n".join(lines)


def near_copy(text: str, similarity: float, rng: np.random.Generator) -> str:
    """A run of words replaced, so that about ``similarity`` of the shingles are shared."""
    words = text.split(" ")
    n = max(int(len(words) * (1 - similarity) / (1 + similarity)) - 5, 0)
    start = int(rng.integers(0, len(words) - n))
    words[start : start + n] = [f"replacement{number}" for number in rng.integers(0, 10**9, n)]
    return " ".join(words)


def junk(number: int, rng: np.random.Generator) -> str:
    kinds = [
        lambda: "\n".join(" ".join(map(str, rng.integers(0, 10**6, 12))) for _ in range(30)),
        lambda: "\n".join(["Click here to read more about our offers"] * 40),
        lambda: " ".join(f"#tag{n}" for n in rng.integers(0, 10**6, 150)),
        lambda: " ".join(rng.choice(["shoes", "cheap", "buy", "sale", "price", "online"], 200)),
        lambda: "\n".join(f"- item {n}" for n in rng.integers(0, 10**6, 80)),
    ]
    return kinds[number % len(kinds)]()


def jaccard(one: str, other: str) -> float:
    a, b = ({*shingles(text.encode(), 5)} for text in (one, other))
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    rng = np.random.default_rng(0)
    write = english(rng)
    texts = {f"clean{number:03d}": next(write) for number in range(N_CLEAN)}
    for number, similarity in enumerate(np.linspace(0.5, 1.0, 240)):
        texts[f"copy{number:03d}"] = near_copy(texts[f"clean{number:03d}"], float(similarity), rng) + " "
    texts |= {f"junk{number:03d}": junk(number, rng) for number in range(N_JUNK)}
    folder = tmp_path_factory.mktemp("planted")
    ids = list(texts)
    rng.shuffle(ids)
    rows = (json.dumps({"id": id, "text": texts[id]}) + "\n" for id in ids)
    (folder / "texts.jsonl").write_text("".join(rows))
    config = data.CorpusConfig(
        sources=(data.JsonLines(path=folder / "texts.jsonl", id_field="id"),),
        rules=(Gopher(), GopherRepetition(), FineWeb()),
        near_duplicates=data.MinHash(),
        decontaminate=None,
        vocabulary=300,
    )
    return texts, data.build(config, folder / "out", engine=Local(processes=1))


def removed(corpus) -> dict[str, dict]:
    return {row["id"]: row for row in pq.read_table(corpus.path / "removed.parquet").to_pylist()}


def test_planted_duplicates_at_or_above_the_threshold_are_found(planted):
    texts, corpus = planted
    gone = removed(corpus)
    pairs = {id: id.replace("copy", "clean") for id in texts if id.startswith("copy")}
    alike = [(a, b) for a, b in pairs.items() if jaccard(texts[a], texts[b]) >= 0.75]
    assert len(alike) > 80
    found = [a in gone or b in gone for a, b in alike]
    assert np.mean(found) >= 0.95


def test_removals_are_true_by_exact_similarity(planted):
    texts, corpus = planted
    near = [row for row in removed(corpus).values() if row["rule"] == "near_duplicate"]
    assert len(near) > 70
    exact = [jaccard(texts[row["id"]], texts[row["survivor"]]) for row in near]
    assert np.mean(np.array(exact) >= 0.75) >= 0.98
    np.testing.assert_allclose([row["score"] for row in near], exact, atol=1e-9)
    assert np.abs(np.array([row["estimated"] for row in near]) - exact).max() < 0.2


def test_clean_documents_stay(planted):
    texts, corpus = planted
    gone = removed(corpus)
    twins = {row["survivor"] for row in gone.values()}
    clean = [id for id in texts if id.startswith("clean")]
    lost = [id for id in clean if id in gone and gone[id]["survivor"] not in {id.replace("clean", "copy")}]
    assert twins
    assert len(lost) <= 0.01 * N_CLEAN, [gone[id]["rule"] for id in lost]
    kept = {d.id for split in SPLITS for d in corpus.documents(split)}
    assert len(kept) == len(texts) - len(gone)


def test_junk_is_removed(planted):
    _, corpus = planted
    gone = removed(corpus)
    assert sum(id.startswith("junk") for id in gone) >= 0.95 * N_JUNK
    assert len({gone[id]["rule"] for id in gone if id.startswith("junk")}) >= 3


def test_measured_recall_follows_the_theory(planted):
    """The canary's candidates by similarity, against ``1 - (1 - s^r)^b``, within four standard deviations."""
    _, corpus = planted
    near = corpus.manifest["near_duplicates"]
    assert near["canary"]["found"] >= 0.9 * near["canary"]["planted"] > 30
    for row in near["recall"]:
        low, high = (
            collision_probability(min(s, 1.0), near["bands"], near["rows"])
            for s in (row["similarity"], row["similarity"] + 0.05)
        )
        share, slack = row["found"] / row["pairs"], 4 * np.sqrt(0.25 / row["pairs"])
        assert low - slack <= share <= high + slack
