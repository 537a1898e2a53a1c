"""What cannot be read or judged stops a build, or is counted, listed and never taken for done."""

import gzip
import json
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data import documents
from efftrain.data.report.alerts import alarms
from efftrain.data.rules import AtMost
from efftrain.data.sources import base as sources
from efftrain.data.stages.engines import Local
from efftrain.errors import ConfigError, CorpusError


@dataclass(frozen=True, kw_only=True)
class Fragile(AtMost):
    """Raises for one document, and says it in two lines."""

    name = "fragile"
    threshold: float = 1.0

    def score(self, text):
        if "document 7 " in text.text:
            raise ValueError("a long story\nno seven, please")
        return 0.0


@dataclass(frozen=True)
class FragileEdit:
    name = "fragile_edit"

    def edit(self, text):
        return text if "document 7 " not in text.text else text.missing


class Impossible(Fragile):
    """Finds a mistake of the user's."""

    def score(self, text):
        raise ConfigError("fragile.threshold is wrong; use 3")


@dataclass(frozen=True, kw_only=True)
class Picky(AtMost):
    """The number of the document."""

    name = "picky"
    threshold: float = 100.0

    def score(self, text):
        return float(text.text.split()[1])


@dataclass(frozen=True, kw_only=True)
class Fickle(data.JsonLines):
    """Gives up in each piece after three documents."""

    def documents(self, piece):
        for number, document in enumerate(super().documents(piece)):
            if number == 3:
                raise RuntimeError("the connection was lost")
            yield document


def lines(n=400, start=0):
    return "".join(
        json.dumps({"text": f"document {k} of these\n" * 5}) + "\n" for k in range(start, start + n)
    ).encode()


@pytest.fixture
def folder(tmp_path):
    """Two whole files and one that breaks off."""
    path = tmp_path / "crawl"
    path.mkdir()
    (path / "a.jsonl").write_bytes(lines())
    (path / "b.jsonl.gz").write_bytes(gzip.compress(lines(400, 400)))
    (path / "c.jsonl.gz").write_bytes(gzip.compress(lines(400, 800))[:1000])
    return path


def config_for(path, **fields):
    source = data.JsonLines(path=path)
    return data.CorpusConfig(sources=(source,), vocabulary=300, **({"rules": ()} | fields))


def build(config, out, **arguments):
    return data.build(config, out, engine=Local(processes=1), **arguments)


def said(capfd):
    return " ".join(capfd.readouterr().err.split())


def test_a_file_that_breaks_off_stops_the_build_and_names_it(folder, tmp_path):
    with pytest.raises(CorpusError, match=r"1 file that could not be read.*c\.jsonl\.gz@.*max_unreadable=1"):
        build(config_for(folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_allowed_is_an_alarm(folder, tmp_path, capfd):
    corpus = build(config_for(folder), tmp_path / "out", max_unreadable=1)
    assert corpus.manifest["unreadable"]["files"] == 1
    assert any("could not be read to the end" in alarm for alarm in alarms(corpus.manifest))
    assert "warning: 1 file could not be read to the end" in said(capfd)
    with pytest.raises(CorpusError, match="was built without 1 file"):
        build(config_for(folder), tmp_path / "out")
    assert build(config_for(folder), tmp_path / "out", max_unreadable=1).manifest == corpus.manifest


def test_an_unreadable_piece_is_read_again(folder, tmp_path, monkeypatch):
    """An error of the disk that passes: the input is the same, and so is the plan of the build."""

    def broken(self, piece):
        if piece.files[0][0] == "b.jsonl.gz":
            yield documents.Skipped("b.jsonl.gz@0", "crawl", documents.UNREADABLE, "[Errno 5] Input/output error")
        else:
            yield from whole(self, piece)

    (folder / "c.jsonl.gz").unlink()
    whole = data.JsonLines.documents
    with monkeypatch.context() as patch:
        patch.setattr(data.JsonLines, "documents", broken)
        with pytest.raises(CorpusError, match="Input/output error"):
            build(config_for(folder), tmp_path / "out")
        patch.setattr("efftrain.data.pipeline.writing._tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(config_for(folder), tmp_path / "out", max_unreadable=1)
    corpus = build(config_for(folder), tmp_path / "out")
    assert corpus.filter_statistics[-1]["documents"] == 800
    assert sum(figures["documents"] for figures in corpus.splits.values()) == 800
    assert corpus.manifest["unreadable"]["files"] == 0


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("rule", [Fragile(), FragileEdit()])
def test_a_rule_that_raises_names_document_rule_and_reason(folder, tmp_path, rule):
    (folder / "c.jsonl.gz").unlink()
    reason = "ValueError: no seven, please" if isinstance(rule, Fragile) else "AttributeError: .*missing"
    with pytest.raises(CorpusError, match=rf"'{rule.name}' failed on the document a\.jsonl@\d+ of crawl: {reason}"):
        build(config_for(folder, rules=(rule,)), tmp_path / "out")


@pytest.mark.parametrize("rule", [Fragile(), FragileEdit()])
def test_documents_that_a_rule_cannot_judge_are_counted_and_listed(folder, tmp_path, rule, capfd):
    (folder / "c.jsonl.gz").unlink()
    corpus = build(config_for(folder, rules=(rule,)), tmp_path / "out", on_error="skip")
    row = next(row for row in corpus.filter_statistics if row["stage"] == f"failed/{rule.name}")
    assert row["documents"] == 1
    assert corpus.filter_statistics[-1]["documents"] == 799
    (removed,) = pq.read_table(corpus.path / "removed.parquet").to_pylist()
    assert removed["rule"] == f"failed/{rule.name}"
    assert "Error: " in removed["excerpt"]
    assert f"failed/{rule.name} drops" in said(capfd)


def test_an_unknown_way_to_treat_errors_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="on_error is 'ignore'; choose stop or skip"):
        build(config_for(folder), tmp_path / "out", on_error="ignore")


def test_scores_with_a_gap_are_used_again(folder, tmp_path):
    (folder / "c.jsonl.gz").unlink()
    build(config_for(folder, rules=(Fragile(),)), tmp_path / "out", on_error="skip")
    again = build(
        config_for(folder, rules=(Fragile(threshold=0.5),)), tmp_path / "out", on_error="skip", overwrite=True
    )
    assert again.filter_statistics[-1]["documents"] == 799
    with pytest.raises(CorpusError, match="'fragile' failed on"):
        build(config_for(folder, rules=(Fragile(threshold=0.2),)), tmp_path / "out", overwrite=True)


def test_a_mistake_of_the_user_in_a_rule_keeps_its_sentence(folder, tmp_path):
    (folder / "c.jsonl.gz").unlink()
    for on_error in ("stop", "skip"):
        with pytest.raises(ConfigError, match=r"^fragile\.threshold is wrong; use 3$"):
            build(config_for(folder, rules=(Impossible(),)), tmp_path / "out", on_error=on_error)


def test_a_rule_that_no_worker_can_have_is_one_sentence(folder, tmp_path):
    class Local(Picky):
        pass

    with pytest.raises(ConfigError, match="define its class at the top level of a module"):
        build(config_for(folder, rules=(Local(),)), tmp_path / "out")


def test_a_source_that_raises_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1)
    (folder / "c.jsonl.gz").unlink()
    config = data.CorpusConfig(sources=(Fickle(path=folder),), rules=(), vocabulary=300)
    with pytest.raises(CorpusError, match=r"Fickle raised RuntimeError: the connection was lost after a\.jsonl@\d+"):
        build(config, tmp_path / "out")
    corpus = build(config, tmp_path / "out", on_error="skip", max_unreadable=2)
    assert corpus.filter_statistics[-1]["documents"] == 6
    assert corpus.manifest["unreadable"]["files"] == 2


def test_what_is_wrong_with_the_first_row_is_said_where_nothing_is_left(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"content": "a text"}) + "\n")
    with pytest.raises(
        CorpusError, match=r"'bad_record' removed most.*a\.jsonl@0: there is no field 'text'.*check the source"
    ):
        build(config_for(tmp_path / "a.jsonl"), tmp_path / "out")


def test_most_of_the_text_going_is_an_alarm_with_rule_and_example(folder, tmp_path, capfd):
    (folder / "c.jsonl.gz").unlink()

    build(config_for(folder, rules=(Picky(),)), tmp_path / "out")
    err = said(capfd)
    assert "warning: picky drops 87% of the documents that reach it (699 of 800), such as a.jsonl@" in err
    assert "(document 101 of these document 101" in err


def test_default_rules_keep_prose(tmp_path):
    """Those of source code would take all of it: lines are too long, letters too many."""
    rows = ({"text": f"Essay {n}. " + "It was a long day, and nobody had thought of lunch. " * 40} for n in range(100))
    (tmp_path / "essays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = data.CorpusConfig(sources=(data.JsonLines(path=tmp_path / "essays.jsonl"),), vocabulary=300)
    assert build(config, tmp_path / "out").filter_statistics[-1]["documents"] == 100
    assert data.CorpusConfig(sources=(data.PythonFiles(),)).rules == (data.Code(),)
    with pytest.raises(ConfigError, match=r"set corpus\.rules"):
        data.CorpusConfig(sources=(data.PythonFiles(), data.JsonLines(path=tmp_path)))


def test_sources_of_one_name_and_their_documents_are_told_apart(tmp_path):
    for site in ("a", "b"):
        path = tmp_path / site / "texts"
        path.mkdir(parents=True)
        (path / "one.txt").write_text(f"the first text of {site}")
        (path / "two.txt").write_text(f"the second text of {site}")
    config = data.CorpusConfig(
        sources=tuple(data.TextFolder(path=tmp_path / site / "texts") for site in "ab"), rules=(), vocabulary=300
    )
    corpus = build(config, tmp_path / "out")
    found = {d.id: d.source for split in corpus.splits for d in corpus.documents(split)}
    assert found == {f"{site}/texts:{name}.txt": f"{site}/texts" for site in "ab" for name in ("one", "two")}
    assert corpus.manifest["sources"].keys() == {"a/texts", "b/texts"}


def test_an_id_that_two_documents_have_is_refused(tmp_path):
    rows = [{"id": "same" if n in (3, 8) else str(n), "text": f"text number {n}"} for n in range(12)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = data.CorpusConfig(
        sources=(data.JsonLines(path=tmp_path / "a.jsonl", id_field="id"),), rules=(), vocabulary=300
    )
    with pytest.raises(CorpusError, match=r"1 documents have the id of another document, such as 'same'"):
        build(config, tmp_path / "out")


def test_lines_end_alike_and_begin_without_a_mark_whatever_the_file(tmp_path):
    """A byte order mark and Windows' newlines hide repeats and paragraphs from everything that comes after."""
    notice = "this notice stands below each of the pages of the site"
    (tmp_path / "texts").mkdir()
    for name, text in (
        ("a", f"alpha beta\n\n{notice}\n"),
        ("b", f"gamma delta\r\n\r\n{notice}\r\n"),
        ("c", "plain text"),
    ):
        (tmp_path / "texts" / f"{name}.txt").write_bytes(text.encode())
    (tmp_path / "texts" / "d.txt").write_bytes(b"\xef\xbb\xbfplain text\r\n")
    (tmp_path / "texts" / "e.txt").write_bytes(b"old\rnewlines")
    config = data.CorpusConfig(
        sources=(data.TextFolder(path=tmp_path / "texts"),),
        rules=(),
        vocabulary=300,
        line_deduplication=data.LineDeduplication(unit="paragraph"),
    )
    corpus = build(config, tmp_path / "out")
    found = {d.id: d.text for split in corpus.splits for d in corpus.documents(split)}
    assert found.keys() == {"a.txt", "b.txt", "c.txt", "e.txt"}
    assert "notice" in found["a.txt"]
    assert found["b.txt"].strip() == "gamma delta"
    assert found["e.txt"] == "old\nnewlines"


def test_a_split_that_decontamination_empties_is_an_alarm(tmp_path, capfd):
    """A document that quotes all others keeps none of them apart."""
    texts = [f"text {n} " + " ".join(f"w{n}x{k}" for k in range(40)) for n in range(60)]
    rows = [{"text": text, "id": str(n)} for n, text in enumerate(texts)] + [{"text": "\n".join(texts), "id": "all"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = build(config_for(tmp_path / "a.jsonl"), tmp_path / "out")
    assert "validation" not in corpus.splits
    assert "warning: The split validation has no documents" in said(capfd)
