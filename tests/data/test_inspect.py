"""The inspector: which removed documents it shows, how, and that no document can steer the terminal."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest
import report_corpus

from efftrain.data.report.inspect import describe, inspect_corpus
from efftrain.data.report.scores import Interval
from efftrain.errors import ConfigError, CorpusError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return report_corpus.write(tmp_path_factory.mktemp("inspect") / "small")


@pytest.fixture
def shown(corpus, capsys):
    """Calls the inspector and gives the ids it shows."""

    def call(**options):
        inspect_corpus(corpus, **options)
        text = capsys.readouterr().out
        assert "Enter: next" not in text
        return re.findall(r"^(\S+)  (?:web|books), 100 bytes$", text, re.MULTILINE)

    return call


def test_rule_and_source_choose_rows_in_the_order_of_the_table(shown):
    assert shown(rule="table_like", limit=3) == ["table00", "table01", "table02"]
    assert shown(source="books", limit=2) == ["table00", "table01"]
    assert shown(limit=1) == ["short00"]


def test_without_a_terminal_twenty_are_shown(shown):
    assert shown(rule="too_short") == [f"short{n:02d}" for n in range(20)]


def test_limit_beyond_the_end_shows_all(shown):
    assert len(shown(rule="table_like", limit=1000)) == 25


def test_seed_chooses_at_random_and_repeats(shown):
    first = shown(rule="too_short", seed=1, limit=10)
    assert first == shown(rule="too_short", seed=1, limit=10) != shown(rule="too_short", seed=2, limit=10)
    assert len(set(first)) == 10
    assert all(id.startswith("short") for id in first)
    assert {id[:5] for id in shown(seed=0, limit=100)} == {"short", "table", "near1", "near0"}


def test_score_stands_against_the_threshold(corpus, capsys):
    inspect_corpus(corpus, rule="too_short", limit=4)
    assert "too_short  score 3, keeps at least 64" in capsys.readouterr().out


def test_near_duplicate_shows_survivor_evidence_and_coloured_diff():
    row = report_corpus.near_duplicate("a", "c", 3, "--- kept\n+++ removed\n@@ -1 +1 @@\n-old\n+new")
    text = describe(row, None)
    assert "score 0.9  similarity estimated 0.875, 9 bands agree, 3 documents in cluster c" in text.plain
    assert "kept in its place: c/kept" in text.plain
    assert "text of a" not in text.plain
    colours = {text.plain[span.start : span.end].strip(): span.style for span in text.spans}
    assert (colours["-old"], colours["+new"], colours["--- kept"]) == ("red", "green", "dim")


def test_control_characters_and_console_markup_are_shown_not_obeyed(capsys):
    row = report_corpus.removed_row("a\x1b[2J", "r", 1.0, excerpt="\x1b]0;t\x07 \x9b1m [bold]x[/bold] \u202eabc")
    text = describe(row, Interval(high=0.5)).plain
    assert "a␛[2J" in text
    assert "␛]0;t␇ \ufffd1m [bold]x[/bold] \ufffdabc" in text


def test_unknown_rule_lists_those_that_removed_something(corpus):
    with pytest.raises(CorpusError) as error:
        inspect_corpus(corpus, rule="too_shrt")
    assert str(error.value).endswith(
        "was removed by rule 'too_shrt'; choose one of near_duplicate (105), table_like (25), too_short (40)"
    )


def test_unknown_source_lists_those_of_the_rule(corpus):
    with pytest.raises(CorpusError, match="no document of source 'web' was removed by table_like; choose one of books"):
        inspect_corpus(corpus, rule="table_like", source="web")


def test_nothing_to_inspect(tmp_path, corpus):
    with pytest.raises(CorpusError, match="there is no corpus"):
        inspect_corpus(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match="no document was removed from"):
        inspect_corpus(report_corpus.write(tmp_path / "clean", rows=[]))
    (tmp_path / "clean" / "removed.parquet").unlink()
    with pytest.raises(CorpusError, match=r"removed\.parquet is missing; build the corpus again"):
        inspect_corpus(tmp_path / "clean")
    with pytest.raises(ConfigError, match="--limit is 0"):
        inspect_corpus(corpus, limit=0)


def test_on_a_terminal_enter_goes_on_and_q_ends(corpus):
    """In a real pseudo terminal: two documents for one Enter, then q."""
    program = f"from efftrain.data.report.inspect import inspect_corpus; inspect_corpus({json.dumps(str(corpus))})"
    terminal, side = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=side, stdout=side, stderr=side, close_fds=True)
    os.close(side)
    seen, answers = "", [b"\n", b"q\n"]
    try:
        while True:
            seen += os.read(terminal, 4096).decode()
            if answers and seen.count("quit") == 3 - len(answers):
                os.write(terminal, answers.pop(0))
    except OSError:  # the other side is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    assert "short00" in seen
    assert "short01" in seen
    assert "short02" not in seen
    assert "1 of 170" in seen
