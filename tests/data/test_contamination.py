"""Decontamination as a build does it; the formulas have tests of their own."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data.decontaminate import Decontaminate, EvaluationSet
from efftrain.data.engines import Local
from efftrain.data.splits import SPLITS
from efftrain.errors import ConfigError, CorpusError

QUESTION = "which of the seven seas did the old captain cross when he lost his second ship to a storm"
NOTICE = " ".join(f"licence{number}" for number in range(30))
N = 120
QUOTING = range(0, 30, 3)  # documents without a copy


def write(path: Path, texts: dict[str, str]) -> data.JsonLines:
    path.write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in texts.items()))
    return data.JsonLines(path=path, id_field="id")


@pytest.fixture(scope="module")
def texts():
    """Own text each, the same notice in all; every third copies 60 of its 100 words from the one before."""
    rng = np.random.default_rng(0)
    made = {}
    for number in range(N):
        own = [f"w{word}" for word in rng.integers(0, 100_000, 100)]
        if number % 3 == 2:
            own[:60] = made[f"{number - 1:03d}"].split()[30:90]
        made[f"{number:03d}"] = f"{NOTICE} {' '.join(own)}"
    for number in QUOTING:
        made[f"{number:03d}"] += f" and {QUESTION.upper()}?"
    return made


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contaminated")
    quiz = write(folder / "quiz.jsonl", {"q1": QUESTION, "q2": "a question that nobody ever put into any corpus " * 3})
    config = data.CorpusConfig(
        sources=(write(folder / "texts.jsonl", texts),),
        rules=(),
        vocabulary=300,
        split=data.SplitByPackage(validation=0.2, test=0.2),
        decontaminate=Decontaminate(sets=(EvaluationSet(name="quiz", source=quiz),)),
    )
    return data.build(config, folder / "out", engine=Local(processes=1))


def split_of(corpus) -> dict[str, str]:
    return {d.id: split for split in SPLITS for d in corpus.documents(split)}


def removed(corpus) -> dict[str, tuple[str, float]]:
    rows = pq.read_table(corpus.path / "removed.parquet").to_pylist()
    return {row["id"]: (row["rule"], row["score"]) for row in rows}


def test_what_copies_from_training_leaves_the_held_out_splits(corpus, texts):
    where, gone = split_of(corpus), removed(corpus)
    held_out = {"contaminated/validation", "contaminated/test"}
    for number in range(2, N, 3):
        pair = [f"{number - 1:03d}", f"{number:03d}"]
        before = {id: where.get(id) or gone[id][0].removeprefix("contaminated/") for id in pair}
        for id, other in (pair, pair[::-1]):
            copied = before[id] != "train" and before[other] == "train"
            assert (id in gone and gone[id][0] in held_out) == copied
    assert sum(rule in held_out for rule, _ in gone.values()) > 5
    assert 0.3 < np.mean([score for rule, score in gone.values() if rule in held_out]) < 0.6


def test_a_notice_that_all_share_condemns_nobody(corpus):
    """30 of 130 words, above the limit of a fifth, in every document."""
    assert {"validation", "test"} <= set(split_of(corpus).values())


def test_an_evaluation_set_is_kept_out_of_training(corpus):
    where, gone = split_of(corpus), removed(corpus)
    quoting = [f"{number:03d}" for number in QUOTING]
    assert not any(where.get(id) == "train" for id in quoting)
    found = [id for id, (rule, _) in gone.items() if rule == "contaminated/quiz"]
    assert found
    assert {*found} <= {*quoting}
    assert all(0 < gone[id][1] < 0.2 for id in found)
    assert corpus.manifest["decontamination"]["quiz"]["removed"] == len(found)
    assert corpus.manifest["decontamination"]["quiz"]["documents"] == 2


def test_the_report_adds_up(corpus):
    rows = {row["stage"]: row["documents"] for row in corpus.funnel}
    for split in ("validation", "test"):
        figures = corpus.manifest["decontamination"][split]
        assert rows.get(f"contaminated/{split}", 0) == figures["removed"]
        assert figures["documents"] - figures["removed"] == corpus.splits[split]["documents"]


def test_without_it_everything_stays(corpus, texts, tmp_path):
    config = data.CorpusConfig(
        sources=(write(tmp_path / "texts.jsonl", texts),), rules=(), vocabulary=300, decontaminate=None
    )
    assert len(split_of(data.build(config, tmp_path / "out", engine=Local(processes=1)))) == N


def test_an_evaluation_set_that_cannot_be_read_stops_the_build(texts, tmp_path):
    path = tmp_path / "quiz.jsonl"
    path.write_text('{"wrong": 1}\n')
    quiz = EvaluationSet(name="quiz", source=data.JsonLines(path=path))
    config = data.CorpusConfig(
        sources=(write(tmp_path / "texts.jsonl", texts),), rules=(), decontaminate=Decontaminate(sets=(quiz,))
    )
    with pytest.raises(CorpusError, match="'quiz' cannot be read"):
        data.build(config, tmp_path / "out", engine=Local(processes=1))


def test_a_set_named_like_a_split_is_refused():
    source = data.JsonLines(path=Path("x"))
    with pytest.raises(ConfigError, match="'test'"):
        Decontaminate(sets=(EvaluationSet(name="test", source=source),))
