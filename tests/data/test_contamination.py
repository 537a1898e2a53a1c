"""Decontamination as a build does it; the formulas have tests of their own."""

import html
import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from efftrain import data
from efftrain.data.decontamination.decontaminate import Decontaminate, EvaluationSet
from efftrain.data.splits import SPLITS
from efftrain.data.stages.engines import Local
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
        split=data.SplitByGroup(validation=0.2, test=0.2),
        decontaminate=Decontaminate(sets=(EvaluationSet(name="quiz", source=quiz),)),
    )
    return data.build(config, folder / "out", engine=Local(processes=1))


def split_of(corpus) -> dict[str, str]:
    return {d.id: split for split in SPLITS for d in corpus.documents(split)}


def removed(corpus) -> dict[str, tuple[str, float]]:
    rows = pq.read_table(corpus.path / "removed.parquet").to_pylist()
    return {row["id"]: (row["rule"], row["score"]) for row in rows}


@pytest.mark.smoke
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
    """30 of 130 words, above the threshold of a fifth, in every document."""
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
    rows = {row["stage"]: row["documents"] for row in corpus.filter_statistics}
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


ENGLISH = (
    "Which of the efficient officers' ships, the \"Elm\" or the 'Oak', did not cross the wide North Sea - and why?"
)
GERMAN = (
    "Welches der größten Schiffe, die „Föhre“ oder die ‚Möwe‘, überquerte im März nicht die schöne Ägäis – und wieso?"
)


def hyphenated(text: str, hyphen: str) -> str:
    """Each line ends in the middle of a word."""
    cuts = sorted({next(i for i in range(at, len(text)) if text[i - 2 : i + 2].isalpha()) for at in (12, 33, 56, 80)})
    for i in reversed(cuts):
        text = f"{text[:i]}{hyphen}{text[i:]}"
    return text


def lined(text: str, mark) -> str:
    """Four words a line, each begun by what ``mark`` makes of its number."""
    found = text.split()
    return "\n" + "\n".join(mark(i // 4 + 1) + " ".join(found[i : i + 4]) for i in range(0, len(found), 4)) + "\n"


def full_width(text: str) -> str:
    return "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)


def in_letters(text: str, mark: str) -> str:
    return "".join(char + mark if char in "aeinst" else char for char in text)


FORMS = {
    "as it is": lambda t: t,
    "capitals": str.upper,
    "no-break spaces": lambda t: t.replace(" ", "\u00a0"),
    "narrow no-break spaces": lambda t: t.replace(" ", "\u202f"),
    "ideographic spaces": lambda t: t.replace(" ", "\u3000"),
    "full-width letters": full_width,
    "mathematical bold": lambda t: "".join(chr(0x1D400 + ord(c) - 65) if "A" <= c <= "Z" else c for c in t.upper()),
    "decomposed accents": lambda t: unicodedata.normalize("NFD", t),
    "ligatures": lambda t: t.replace("ffi", "ﬃ").replace("st", "ﬆ"),
    "curly quotes": lambda t: t.replace('"', "”").replace("'", "’").replace("„", '"'),
    "dashes": lambda t: t.replace(" - ", "—").replace(" – ", "—"),
    "soft hyphens": lambda t: in_letters(t, "\u00ad"),
    "zero-width spaces": lambda t: in_letters(t, "\u200b"),
    "zero-width joiners": lambda t: in_letters(t, "\u200d"),
    "word joiners": lambda t: in_letters(t, "\u2060"),
    "byte order marks": lambda t: t.replace(" ", " \ufeff"),
    "direction marks": lambda t: t.replace(" ", "\u200e \u202a"),
    "hyphens at line ends": lambda t: hyphenated(t, "-\n"),
    "hyphens and indents": lambda t: hyphenated(t, "- \n    "),
    "Unicode hyphens at line ends": lambda t: hyphenated(t, "\u2010\n"),
    "soft hyphens at line ends": lambda t: hyphenated(t, "\u00ad\n"),
    "hyphens in a quotation": lambda t: hyphenated(t, "-\n> "),
    "line numbers": lambda t: lined(t, "{} ".format),
    "numbered list": lambda t: lined(t, "{}. ".format),
    "listing": lambda t: lined(t, "{:>4} | ".format),
    "colons after line numbers": lambda t: lined(t, "line {}: ".format),
    "quotation marks of mail": lambda t: lined(t, lambda _: "> "),
    "bullets": lambda t: lined(t, lambda _: "\u2022 "),
    "JSON newlines": lambda t: lined(t, lambda _: "").replace("\n", "\\n"),
    "JSON newlines twice": lambda t: lined(t, lambda _: "").replace("\n", "\\\\n"),
    "JSON string": lambda t: json.dumps(lined(t, lambda _: "\t")),
    "JSON with line numbers": lambda t: json.dumps(lined(t, "{}. ".format)),
    "JSON with hyphens": lambda t: json.dumps(hyphenated(t, "-\n"), ensure_ascii=False),
    "HTML entities": lambda t: html.escape(t).replace(" ", "&nbsp;").replace("ö", "&ouml;").replace("ä", "&#228;"),
    "HTML lines": lambda t: lined(t, lambda _: "").replace("\n", "<br/>\n").replace("the", "<b>the</b>"),
    "Windows lines": lambda t: lined(t, lambda _: "").replace("\n", "\r\n"),
}


def built(folder: Path, training: dict[str, str], quizzes: dict[str, list[str]], **settings) -> data.Corpus:
    sets = tuple(
        EvaluationSet(
            name=name, source=write(folder / f"{name}.jsonl", dict(zip(map(str, range(len(t))), t, strict=True)))
        )
        for name, t in quizzes.items()
    )
    config = data.CorpusConfig(
        sources=(write(folder / "texts.jsonl", training),),
        rules=(),
        vocabulary=300,
        near_duplicates=None,
        split=data.SplitByGroup(validation=0.0, test=0.0),
        decontaminate=Decontaminate(sets=sets, **settings),
    )
    return data.build(config, folder / "out", engine=Local(processes=1))


def padded(rng, text: str) -> str:
    """Between lines of other words."""
    return "{}\n{}\n{}".format(*(" ".join(f"w{n}" for n in rng.integers(0, 10**6, 40)) for _ in "ab"), text)


def test_a_question_is_found_in_every_form_it_is_copied_in(tmp_path):
    """In two languages; texts that hold one word less of it, or its words in another order, stay."""
    rng, training = np.random.default_rng(0), {}
    for language, question in (("en", ENGLISH), ("de", GERMAN)):
        for form, make in FORMS.items():
            training[f"{language}/{form}"] = padded(rng, make(question))
        training[f"{language}/control/part"] = padded(rng, " ".join(question.split()[3:14]))
        for form, make in FORMS.items():
            training[f"{language}/control/{form}"] = padded(rng, make(" ".join(question.split()[::-1])))
    corpus = built(tmp_path, training, {"quiz": [ENGLISH, GERMAN]})
    kept = {document.id for document in corpus.documents("train")}
    assert kept == {id for id in training if "/control/" in id}


def test_short_questions_are_kept_out_of_training_and_phrases_are_not(tmp_path):
    """Questions of 5 to 12 words, each verbatim in one document; a set of n-grams of 13 words would protect none."""
    rng = np.random.default_rng(1)
    questions = [" ".join(f"q{n}" for n in rng.integers(0, 10**6, 5 + i % 8)) + "?" for i in range(48)]
    hanzi = ["中国的首都是哪个城市", "谁写了关于鲸鱼的第一本小说", "โรงเรียนนี้ตั้งอยู่ที่ไหนในกรุงเทพ"]
    phrases = ["what is love", "你好吗", "ขอบคุณมากครับ"]
    training = {f"asks {i}": padded(rng, text.upper()) for i, text in enumerate([*questions, *hanzi])}
    for i, text in enumerate(questions):  # without the last word, and with less than an n-gram
        training[f"asks {i} in part"] = padded(rng, " ".join(text.split()[:-1][:7]))
    training |= {f"says {text}": padded(rng, text) for text in phrases}
    training["is a phrase"] = "What is love?"
    quizzes = {"short": [*questions, *phrases], "asian": hanzi, "long": [" ".join(f"l{n}" for n in range(30))]}
    corpus = built(tmp_path, training, quizzes)
    assert {document.id for document in corpus.documents("train")} == {
        id for id in training if "in part" in id or id.startswith("says")
    }
    figures = {name: corpus.manifest["decontamination"][name] for name in quizzes}
    assert figures == {
        "short": {"documents": 51, "short": 3, "n": 8, "removed": 49},
        "asian": {"documents": 3, "short": 0, "n": 8, "removed": 3},
        "long": {"documents": 1, "short": 0, "n": 13, "removed": 0},
    }
