"""Reading a task's files: planted errors with their lines, and what is divided and removed."""

import json
from collections import Counter
from pathlib import Path

import pytest

from efftrain.data.tasks.synthetic import in_words, write_amounts, write_questions
from efftrain.data.tasks.task import TaskFiles, open_task, read_examples
from efftrain.errors import ConfigError, CorpusError

GOOD = 'text,label\nwhere is it,where\n"a, b\nand ""c""",cancel\nstop,cancel\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_and_json_lines_say_the_same(tmp_path):
    from_csv = read_examples(write(tmp_path / "a.csv", "\ufeff" + GOOD), "text", "label")
    assert [(e.text, e.answer, e.line) for e in from_csv] == [
        ("where is it", "where", 2),
        ('a, b\nand "c"', "cancel", 3),
        ("stop", "cancel", 5),
    ]
    lines = "".join(json.dumps({"text": e.text, "label": e.answer, "other": 1}) + "\n" for e in from_csv)
    from_json = read_examples(write(tmp_path / "a.jsonl", lines), "text", "label")
    assert [(e.text, e.answer) for e in from_json] == [(e.text, e.answer) for e in from_csv]
    renamed = read_examples(write(tmp_path / "b.csv", "q,x\r\nwhy,r\r\n"), "q", "x")
    assert [(e.text, e.answer, e.line) for e in renamed] == [("why", "r", 2)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("open.csv", 'text,label\na,b\n"never closed,b\nc,d\ne,f\n', ("begins in line 3", "close its quotation marks")),
        ("after.csv", 'text,label\na,b\n"two\nlines" more,b\n', ("begins in line 3", "not CSV")),
        ("column.csv", "question,label\na,b\n", ("line 2", "no column 'text'", "question, label")),
        ("empty.csv", "text,label\na,b\n  ,b\n", ("line 3", "'text' is empty")),
        ("nolabel.csv", "text,label\na,b\nc,\n", ("line 3", "'label' is empty")),
        ("blank.csv", "text,label\na,b\n\nc,d\n", ("line 3", "0 fields")),
        ("fields.csv", "text,label\na, b,c\n", ("line 2", "3 fields", "quote fields that contain commas")),
        ("twice.csv", "text,text,label\na,b,c\n", ("line 1", "'text' appears twice")),
        ("header.csv", "text,label\n", ("no examples",)),
        ("nothing.jsonl", "", ("no examples",)),
        ("json.jsonl", '{"text": "a", "label": "b"}\n{"text": "a", label}\n', ("line 2", "not JSON")),
        ("blank.jsonl", '\n{"text": "a", "label": "b"}\n', ("line 1", "not JSON")),
        ("list.jsonl", '["a", "b"]\n', ("line 1", "not a JSON object")),
        ("number.jsonl", '{"text": "a", "label": 3}\n', ("line 1", "'label' is 3")),
        ("lacks.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', ("line 2", "no column 'label'", "text")),
        ("latin.csv", b"text,label\na,b\nna\xefve,b\n", ("line 3", "0xef", "not UTF-8")),
        ("table.txt", "a", ("neither .csv nor .jsonl",)),
    ],
)
def test_errors_are_one_sentence_with_their_line(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    with pytest.raises(CorpusError) as raised:
        read_examples(path, "text", "label")
    message = str(raised.value)
    assert all(word in message for word in (str(path), *words)), message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a.csv", "a.CSV"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\n  \n\t\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_blank_lines_at_the_end_newlines_and_the_byte_order_mark_mean_nothing(tmp_path, name, end, newline):
    content = ('\ufefftext,label\n"two\nlines",a\nfour,b c ' + end).replace("\n", newline)
    found = read_examples(write(tmp_path / name, content), "text", "label")
    assert [(e.text, e.answer, e.line) for e in found] == [("two\nlines", "a", 2), ("four", "b c ", 4)]


def test_blank_lines_at_the_end_of_json_lines_mean_nothing(tmp_path):
    content = '\ufeff{"text": "a\\r\\nb", "label": "c"}\r\n\r\n \r\n'
    found = read_examples(write(tmp_path / "a.jsonl", content), "text", "label")
    assert [(e.text, e.answer, e.line) for e in found] == [("a\nb", "c", 1)]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match=r"cannot read .*none\.csv"):
        read_examples(tmp_path / "none.csv", "text", "label")


@pytest.fixture
def files(tmp_path):
    rows = [(f"{label} question {i}", label) for label, n in {"a": 20, "b": 10, "c": 2}.items() for i in range(n)]
    labelled = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    test = write(tmp_path / "test.csv", "text,label\nA  question 3,a\nnew,b\n")
    unlabelled = write(tmp_path / "more.csv", "text\nfresh\nb question 1\nNEW\nFresh\n")
    return TaskFiles(labelled=write(tmp_path / "train.csv", labelled), test=test, unlabelled=unlabelled)


def test_texts_of_the_test_are_removed_and_counted(files):
    task = open_task(files)
    assert task.labels == ("a", "b", "c")
    assert task.removed == {"labelled, known": 1, "unlabelled, known": 2, "unlabelled, repeated": 1}
    assert "a question 3" not in {e.text for e in task.train + task.validation}
    assert [e.text for e in task.unlabelled] == ["fresh"]
    assert [e.text for e in task.test] == ["A  question 3", "new"]
    assert task.numbers(task.test).tolist() == [0, 1]


def test_the_validation_part_has_the_same_share_of_each_label_and_never_all(files):
    from dataclasses import replace

    task = open_task(replace(files, validation=0.3))
    assert Counter(e.answer for e in task.validation) == {"a": 6, "b": 3, "c": 1}
    assert Counter(e.answer for e in task.train) == {"a": 13, "b": 7, "c": 1}
    assert not {e.text for e in task.train} & {e.text for e in task.validation}
    assert open_task(replace(files, validation=0.3)) == task
    assert open_task(replace(files, validation=0.3, seed=1)).validation != task.validation


def test_labels_that_cannot_be_learnt_are_named(files):
    from dataclasses import replace

    write(files.test, "text,label\nx,a\ny,zebra\n")
    with pytest.raises(CorpusError, match=r"test\.csv, line 3: label 'zebra' has no labelled example"):
        open_task(files)
    write(files.test, "text,label\nc question 1,c\n")
    with pytest.raises(CorpusError, match=r"label 'c' has 1 example that the test file does not hold; give at least 2"):
        open_task(files)
    write(files.test, "text,label\nx,a\n")
    write(files.unlabelled, "text,label\nx,a\ny,zebra\n")
    with pytest.raises(CorpusError, match=r"more\.csv, line 3: label 'zebra'"):
        open_task(files)
    write(files.labelled, "text,label\nx,a\ny,a\n")
    with pytest.raises(CorpusError, match="only one label"):
        open_task(files)
    with pytest.raises(ConfigError, match=r"files\.validation is 1"):
        replace(files, validation=1.0)


def test_completions_are_no_labels(tmp_path):
    rows = write(tmp_path / "a.jsonl", "".join(f'{{"prompt": "{i}", "completion": "{i}!"}}\n' for i in range(10)))
    test = write(tmp_path / "t.jsonl", '{"prompt": "99", "completion": "99!"}\n')
    task = open_task(TaskFiles(labelled=rows, test=test, text="prompt", label="completion", generates=True))
    assert (task.labels, len(task.train), len(task.validation)) == ((), 9, 1)


def test_made_up_tasks_are_the_same_each_time_and_their_parts_apart(tmp_path):
    for write_task, columns in ((write_questions, ("text", "label")), (write_amounts, ("prompt", "completion"))):
        for folder in ("one", "two"):
            write_task(tmp_path / folder, n_labelled=200, n_unlabelled=30, n_test=50)
        one, two = ([(tmp_path / f / f"{p}.csv").read_bytes() for p in ("labelled", "test")] for f in ("one", "two"))
        assert one == two
        parts = [
            read_examples(tmp_path / "one" / f"{part}.csv", *columns, label_needed=part != "unlabelled")
            for part in ("labelled", "unlabelled", "test")
        ]
        texts = [e.text for part in parts for e in part]
        assert len(texts) == len(set(texts)) == 280
    assert in_words(317) == "three hundred and seventeen"
    assert [in_words(n) for n in (0, 40, 99, 700)] == ["zero", "forty", "ninety nine", "seven hundred"]
