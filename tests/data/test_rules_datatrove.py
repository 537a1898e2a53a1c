"""The datatrove presets against what datatrove itself decides, kept in golden_datatrove.json.

The file was made with datatrove 0.10.1, spaCy 3.8.18 and NumPy 2.4.6 on Python 3.11 by

    python -m venv /tmp/dt && /tmp/dt/bin/pip install datatrove==0.10.1 spacy==3.8.18 regex pytest
    PYTHONPATH=. /tmp/dt/bin/python tests/data/test_rules_datatrove.py

from made-up texts and from pages of Python's own documentation. All of it is datatrove's code, words and sentences too.
"""

import json
import random
from pathlib import Path
from zlib import crc32

import pytest

from efftrain.data.documents import Text
from efftrain.data.rules import C4, FineWeb, Gopher, GopherRepetition, judge

GOLDEN = Path(__file__).with_name("golden_datatrove.json")
SETS = {
    "gopher": Gopher.datatrove(),
    "repetition": GopherRepetition.datatrove(),
    "c4": C4.datatrove(),
    "fineweb": FineWeb.datatrove(),
}
RULES = {
    "gopher_short_doc": "gopher/words",
    "gopher_long_doc": "gopher/words",
    "gopher_below_avg_threshold": "gopher/mean_word_length",
    "gopher_above_avg_threshold": "gopher/mean_word_length",
    "gopher_too_many_hashes": "gopher/hash_ratio",
    "gopher_too_many_ellipsis": "gopher/ellipsis_ratio",
    "gopher_too_many_bullets": "gopher/bullet_lines",
    "gopher_too_many_end_ellipsis": "gopher/ellipsis_lines",
    "gopher_below_alpha_threshold": "gopher/alphabetic_words",
    "gopher_enough_stop_words": "gopher/stop_words",
    "dup_para_frac": "repetition/duplicate_paragraphs",
    "dup_para_char_frac": "repetition/duplicate_paragraph_chars",
    "dup_line_frac": "repetition/duplicate_lines",
    "dup_line_char_frac": "repetition/duplicate_line_chars",
    **{f"top_{n}_gram": f"repetition/top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"repetition/duplicate_{n}_grams" for n in range(5, 11)},
    "lorem_ipsum": "c4/lorem_ipsum",
    "curly_bracket": "c4/curly_brackets",
    "too_few_sentences": "c4/sentences",
    "line_punct_ratio": "fineweb/ended_lines",
    "short_line_ratio": "fineweb/short_lines",
    "char_dup_ratio": "fineweb/repeated_line_chars",
    "list_ratio": "fineweb/newlines_per_word",
}
# datatrove rejects a text without lines as "empty" before its first rule; here a rule says so.
EMPTY = {"fineweb": "fineweb/ended_lines"}


def golden() -> dict[str, dict]:
    return json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.exists() else {}


@pytest.mark.parametrize("name", golden())
@pytest.mark.parametrize("set_name", SETS)
def test_preset_decides_as_datatrove_and_for_the_same_reason(name, set_name):
    case = golden()[name]
    judgement = judge(SETS[set_name].rules(), Text(case["text"]))
    reason = case["reasons"][set_name]
    expected = EMPTY.get(set_name) if reason == "empty" else RULES[reason] if reason else None
    assert (judgement.verdict and judgement.verdict.rule) == expected


@pytest.mark.parametrize("name", [name for name, case in golden().items() if case["c4_crc32"] is not None])
def test_c4_preset_edits_as_datatrove(name):
    case = golden()[name]
    edited = judge(C4.datatrove().rules(), Text(case["text"])).text.text
    assert crc32(edited.encode()) == case["c4_crc32"]


def test_golden_file_has_every_reason():
    """Else a rule could be wrong and nothing would show it. The one left out takes 100,000 words."""
    reasons = {reason for case in golden().values() for reason in case["reasons"].values()}
    assert set(RULES) - reasons == {"gopher_long_doc"}


def datatrove_decides(text: str) -> dict:
    """Runs datatrove's filters."""
    import datatrove.pipeline.filters as filters
    from datatrove.data import Document

    reasons, edited = {}, None
    for name, filter_class in (
        ("gopher", filters.GopherQualityFilter),
        ("repetition", filters.GopherRepetitionFilter),
        ("c4", filters.C4QualityFilter),
        ("fineweb", filters.FineWebQualityFilter),
    ):
        document = Document(text=text, id="")
        result = filter_class().filter(document)
        reasons[name] = None if result is True else result[1]
        if name == "c4" and result is True:
            edited = crc32(document.text.encode())
    return {"text": text, "reasons": reasons, "c4_crc32": edited}


def _texts() -> dict[str, str]:
    from pydoc_data.topics import topics

    rng = random.Random(3)
    letters = "aaabcdeeefghiiklmnooprstuvwy"
    stems = ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in range(400)]
    stops = ["the", "of", "and", "to", "a", "in"]

    def words(n: int, stop: bool = True) -> list[str]:
        return [rng.choice(stops) if stop and rng.random() < 0.3 else rng.choice(stems) for _ in range(n)]

    def sentence(n: int = 0) -> str:
        return " ".join(words(n or rng.randint(7, 12))).capitalize() + rng.choice("...?!")

    def prose(lines: int = 6) -> list[str]:
        return [f"{sentence()} {sentence(6)}" for _ in range(lines)]

    def planted(phrase: list[str], times: int, between: int) -> str:
        parts = [" ".join(phrase + words(between, stop=False)) + "." for _ in range(times)]
        return f"{sentence()} With the rest. " + " ".join(parts)

    body = prose()
    cases = {
        "prose": "\n".join(body),
        "paragraphs": "\n\n".join(body) + "\n",
        "windows newlines": "\r\n".join(body),
        "49 words": " ".join(words(48)) + " the. —",
        "50 words": " ".join(words(48)) + " the be.",
        "symbols are no words": " ".join(words(48)) + " the — ... !!! « »",
        "bullets are words": " ".join(words(45)) + " the be" + " •" * 4,
        "short words": " ".join(rng.choice(["a", "to", "be", "of", "it"]) for _ in range(60)),
        "long words": " ".join("".join(rng.choices(letters, k=13)) for _ in range(60)),
        "hashes": " ".join(f"#{word}" if i % 8 == 0 else word for i, word in enumerate(words(90))),
        "hashes at the limit": " ".join(f"#{word}" if i % 10 == 0 else word for i, word in enumerate(words(90))),
        "ellipses": " ".join(f"{word}..." if i % 8 == 0 else word for i, word in enumerate(words(90))),
        "ellipsis characters": " ".join(f"{word}…" if i % 8 == 0 else word for i, word in enumerate(words(90))),
        "bullets": "\n".join(f" - {sentence()}" for _ in range(10)),
        "bullets between blank lines": "\n\n".join(f"• {sentence()}" for _ in range(9)),
        "other bullets": "\n".join(f"* {sentence()}" for _ in range(9)),
        "teasers": "\n".join(line[:-1] + ("..." if i % 2 else ".") for i, line in enumerate(body)),
        "teasers at the limit": "\n".join(line[:-1] + ("…" if i < 3 else ".") for i, line in enumerate(prose(10))),
        "teasers between blank lines": "\n\n".join(
            line[:-1] + ("…" if i < 5 else ".") for i, line in enumerate(prose(10))
        ),
        "numbers": " ".join(str(rng.randint(100, 99999)) if i % 4 == 0 else w for i, w in enumerate(words(80))),
        "no stop words": " ".join(words(80, stop=False)) + ".",
        "capital stop words": " ".join(words(80, stop=False)) + " The Of And.",
        "stop words with commas": " ".join(words(80, stop=False)) + " the, of, and.",
        "repeated lines": "\n".join(body[:4] + body[:3]),
        "repeated short lines": "\n".join(
            line for i, long in enumerate(body) for line in (["Read on", "Top"][i % 2], long)
        ),
        "repeated long line": "\n".join([*prose(3), "", *[" ".join(prose(2))] * 2, *prose(1)]),
        "repeated paragraphs": "\n\n".join(body[:4] + body[:3]),
        "repeated short paragraphs": "\n\n".join(["Menu", "Top", *body[:3], "Menu", "Top", "Menu", "Top", "Menu"]),
        "repeated long paragraph": "\n\n".join([*prose(4), *["\n".join(prose(2))] * 2]),
        "paragraphs between spaces": "\n \n".join(body[:4] + body[:3]),
        "empty first line": "\n\n" + "\n".join(body) + "\n\n",
        "ten words": " ".join(words(10, stop=False)),
        "all the same": "spam " * 80,
        "two in turn": "left right " * 40,
        "javascript": "\n".join([*body[:5], "Please enable JavaScript to see the rest."]),
        "lorem": "\n".join([*body, "This is Lorem ipsum and no more."]),
        "lorem without an end": "\n".join([*body, "This is Lorem ipsum and no more"]),
        "bracket": "\n".join([*body, "It reads a set {one, two} of numbers."]),
        "bracket in javascript": "\n".join([*body, "The JavaScript reads {one, two} here."]),
        "bracket in policy": "\n".join([*body, "The privacy policy has {name} in it."]),
        "lorem in javascript": "\n".join([*body, "The javascript says lorem ipsum here."]),
        "policy": "\n".join([*body, "We use cookies on the site.", "Read our Terms of Use today."]),
        "citations": "\n".join(f"{line[:9]}[12]{line[9:]}[edit] So it is[citation needed]." for line in body),
        "quotes": "\n".join(f"'{line}'" if i % 2 else f'"{line}"' for i, line in enumerate(body)),
        "few sentences": f"{sentence()} {sentence()}\n{sentence()}\nTwo words.",
        "long word": "\n".join([*body[:4], "It was " + "x" * 1001 + " in the end."]),
        "no ends": "\n".join(line[:-1] for line in body),
        "one end in nine": "\n".join([*[" ".join(words(7)) for _ in range(8)], body[0]]),
        "one end in eight": "\n".join([*[" ".join(words(7)) for _ in range(7)], body[0]]),
        "ends of other scripts": "\n".join(line[:-1] + "。।؟𑂿"[i % 4] for i, line in enumerate(body)),
        "ends before spaces": "\n".join(f"{line} " for line in body),
        "lines of 30": "\n".join((sentence(6) + "x" * 30)[:29] + "." for _ in range(12)),
        "lines of 31": "\n".join((sentence(6) + "x" * 31)[:30] + "." for _ in range(12)),
        "list": "\n\n\n".join(f"{sentence(6)}" for _ in range(12)),
        "outside the plane": "\n".join(line.replace("a", "𝒶").replace("the", "the 🎉") for line in body),
        "null bytes": "\n".join(line.replace("e", "\0") for line in body),
        "spaces": " \n\t\n ",
    }
    for n, times, between in ((2, 12, 5), (3, 10, 10), (4, 7, 14)):
        phrase = [word.replace("a", "ou") + "ton" for word in words(n, stop=False)]
        cases[f"phrase of {n}"] = planted(phrase, times, between)
    for n, limit in GopherRepetition().max_duplicate_ngrams:
        # Two phrases that come twice, and else no word twice, all of six letters: n repeats just above its limit.
        n_words = int(2 * n * 6 / 7 / (limit + 0.007))
        pool = ["".join(rng.choices(letters, k=6)) for _ in range(n_words)]
        cases[f"phrases of {n} again"] = " ".join(pool[: 2 * n] + pool[4 * n :] + pool[n : 2 * n] + ["end"] + pool[:n])
    phrase = [word + "ton" for word in words(6, stop=False)]
    moved = "".join(phrase[:2])
    moved = [moved[:3], moved[3:], *phrase[2:]]  # the same letters, another space
    cases["same letters in other words"] = planted([*phrase, "so", *moved], 2, 12)
    cases["emoticons, contractions, addresses"] = "\n".join(
        f"{line} I don't, cannot :-) e.g. http://a.b/c?d=e!" for line in body
    )
    cases["a symbol of spaCy"] = "\n".join([*body, "The flag IS_ALPHA and IS_ALPHA_2 of the token."])
    cases["rows of signs"] = "\n".join([*body, "=" * 79, "-" * 79, "#" * 40, "|---|:--:|", *body[:2], "*" * 79])
    for name, text in sorted(topics.items()):
        if len(text) < 1500:
            cases[f"documentation of {name}"] = text
    return cases


if __name__ == "__main__":
    found = {name: datatrove_decides(text) for name, text in _texts().items()}
    GOLDEN.write_text(json.dumps(found, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    reasons = {reason for case in found.values() for reason in case["reasons"].values()}
    print(len(found), GOLDEN.stat().st_size, "without a case:", sorted(set(RULES) - reasons))
