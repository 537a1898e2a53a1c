import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from efftrain import data
from efftrain.data.dedup.lines import LineDeduplication
from efftrain.data.splits import SPLITS
from efftrain.data.stages.engines import Local
from efftrain.errors import ConfigError

NOTICE = "Subscribe to our newsletter to read every story"


@pytest.fixture
def pages(tmp_path) -> Path:
    """Sixty pages with lines of their own, a notice on each, and one that is nothing but the notice."""
    rows = []
    for number in range(60):
        own = [f"sentence {number} {line} that stands on this page and on no other" for line in range(3)]
        rows.append({"text": "\n".join([own[0], f"  {NOTICE.upper()}  ", "}", *own[1:], "}"]), "id": f"{number:02d}"})
    rows.append({"text": NOTICE, "id": "99"})
    path = tmp_path / "pages.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build(pages, out, config_for, lines, **engine):
    config = config_for(pages, sources=(data.JsonLines(path=pages, id_field="id"),), line_deduplication=lines)
    return data.build(config, out, engine=Local(processes=1, **engine))


def test_a_line_stays_in_the_first_document_only(pages, tmp_path, config_for):
    corpus = build(pages, tmp_path / "out", config_for, LineDeduplication())
    texts = {d.id: d.text for split in SPLITS for d in corpus.documents(split)}
    before = {row["id"]: row["text"] for row in map(json.loads, pages.read_text().splitlines())}
    holders = [id for id, text in texts.items() if NOTICE.lower() in text.lower()]
    assert holders == ["00"]
    assert texts["00"] == before["00"]
    assert texts["07"] == before["07"].replace(f"  {NOTICE.upper()}  \n", "")
    assert "99" not in texts
    assert {row["stage"]: row["documents"] for row in corpus.filter_statistics}["repeated_lines"] == 1
    assert corpus.manifest["repeated_lines"]["repeats"] == 60
    assert corpus.manifest["repeated_lines"]["edited"] == 60


def test_short_lines_stay(pages, tmp_path, config_for):
    corpus = build(pages, tmp_path / "out", config_for, LineDeduplication())
    assert all(d.text.count("}") == 2 for split in SPLITS for d in corpus.documents(split))


def test_little_memory_gives_the_same(pages, tmp_path, config_for, monkeypatch):
    one = build(pages, tmp_path / "one", config_for, LineDeduplication())
    monkeypatch.setattr(Local, "budget", 1000)
    other = build(pages, tmp_path / "other", config_for, LineDeduplication())
    assert one.token_fingerprint == other.token_fingerprint


def test_paragraphs_are_what_blank_lines_part():
    config = LineDeduplication(unit="paragraph", min_chars=3)
    text = "one\nstill one\n\ntwo\n \n\none\nstill one"
    assert "".join(config.split(text)) == text
    counts = Counter(hash for _, hash in config.hashes(text))
    assert sorted(counts.values()) == [1, 2]


@pytest.mark.parametrize("unit", ["line", "paragraph"])
def test_nothing_is_lost_in_splitting(unit):
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = "".join(rng.choice(list("ab \n\r\t\x0b"), size=30))
        assert "".join(LineDeduplication(unit=unit).split(text)) == text


@pytest.mark.parametrize("fields", [{"unit": "page"}, {"min_chars": 0}])
def test_impossible_configurations_are_refused(fields):
    with pytest.raises(ConfigError, match=r"line_deduplication\."):
        LineDeduplication(**fields)
