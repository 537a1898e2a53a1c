"""Scores computed by hand or by brute force, and texts that are hard to bear."""

import math
import random
import sys
from collections import Counter

import pytest

from efftrain.config import from_json, to_json
from efftrain.data.documents import Text
from efftrain.data.rules import (
    C4,
    AlphabeticWords,
    BulletLines,
    C4Lines,
    CurlyBrackets,
    DuplicateLineChars,
    DuplicateLines,
    DuplicateNgrams,
    DuplicateParagraphChars,
    DuplicateParagraphs,
    EllipsisLines,
    EllipsisRatio,
    EndedLines,
    FineWeb,
    Gopher,
    GopherRepetition,
    HashRatio,
    LoremIpsum,
    MeanWordLength,
    NewlinesPerWord,
    RepeatedLineChars,
    Sentences,
    ShortLines,
    StopWords,
    TopNgram,
    WordCount,
    flatten,
    is_edit,
    judge,
    scoring,
    spacy_words,
)
from efftrain.errors import ConfigError

PROSE = """The harbour of the town lies in a bay that opens to the north, and ships have come here since the first days.

In winter it is quiet. The boats that remain are drawn up on the sand, and their owners mend what the summer broke.
Nobody hurries; there is time to talk with whoever walks by, to drink tea, and to look at the sky for signs of snow.

When spring arrives the first sails are seen from the lighthouse, and children run down to be there when they land."""


def test_ordinary_prose_passes_every_set_unchanged_but_for_blank_lines():
    judgement = judge(tuple(flatten((C4(), Gopher(), GopherRepetition(), FineWeb()))), Text(PROSE, "town"))
    assert judgement.verdict is None
    assert judgement.text.text == PROSE.replace("\n\n", "\n")
    assert judgement.text.id == "town"


@pytest.mark.parametrize(
    ("rule", "text", "score"),
    [
        (WordCount(), "one 2 — ... three, •", 3),  # a dash, an ellipsis and a bullet are no words
        (WordCount(as_datatrove=True), "one 2 — ... three, •", 4),  # datatrove knows no bullet
        (MeanWordLength(), "ab abcd! -- abc", (2 + 5 + 3) / 3),
        (HashRatio(), "#a ##b c d", 3 / 4),
        (HashRatio(as_datatrove=True), "#a ##b c d", 3 / 7),  # each sign is a word
        (EllipsisRatio(), "a... b… c d....", 3 / 4),
        (BulletLines(), "• a\n\n  - b\n* c\nd", 3 / 4),
        (BulletLines(as_datatrove=True), "• a\n\n  - b\n* c\nd", 2 / 5),
        (EllipsisLines(), "a...\n\nb… \nc.\n", 2 / 3),
        (EllipsisLines(as_datatrove=True), "a...\n\nb… \nc.\n", 2 / 4),
        (AlphabeticWords(), "a1 22 -- ½ ß", 2 / 5),
        (AlphabeticWords(as_datatrove=True), "She didn't go, though.", 5 / 7),
        (StopWords(), "The cat, (and) THE dog; «with», therefore", 3),
        (StopWords(as_datatrove=True), "The cat, (and) dog; with therefore", 2),
        (StopWords(language="de"), "Der Hund und die Katze", 3),
        (DuplicateLines(), "x\ny\nx\n\nx\nz", 2 / 5),
        (DuplicateLines(count_first=True), "x\ny\nx\n\nx\nz", 3 / 5),
        (DuplicateLines(as_datatrove=True), "\nx\nx\n", 2 / 4),  # the empty last line repeats the empty first one
        (DuplicateLineChars(), "a bc\na bc\nd", 3 / 7),
        (DuplicateLineChars(as_datatrove=True), "a bc\na bc\nd", 4 / 11),
        (DuplicateParagraphs(), "x\ny\n\nz\n \nx\ny", 1 / 3),
        (DuplicateParagraphs(as_datatrove=True), "x\ny\n\nz\n \nx\ny", 0),  # spaces join the last two
        (DuplicateParagraphChars(), "ab\n\nc d\n\nc d\n\nc d", 4 / 8),
        (DuplicateParagraphChars(count_first=True), "ab\n\nc d\n\nc d\n\nc d", 6 / 8),
        (TopNgram(threshold=1, n=2), "a b c a b d", 4 / 6),
        # of two that are as frequent the longer
        (TopNgram(threshold=1, n=2), "a b a bcd a b x a bcd", (1 + 3) * 2 / 13),
        (TopNgram(threshold=1, n=2), "a a a a", 1),  # overlapping occurrences count once
        (TopNgram(threshold=1, n=2), "a b c d", 0),
        (TopNgram(threshold=1, n=2, as_datatrove=True), "a b c d", 3 / 7),
        (TopNgram(threshold=1, n=2, as_datatrove=True), "a a a a", 3 * 3 / 7),
        (DuplicateNgrams(threshold=1, n=2), "ab c d ab c", 3 / 7),
        (DuplicateNgrams(threshold=1, n=2, count_first=True), "ab c d ab c", 6 / 7),
        (DuplicateNgrams(threshold=1, n=2), "a a a a a", 4 / 5),  # all but the first word lies in a second "a a"
        (DuplicateNgrams(threshold=1, n=2, as_datatrove=True), "a a a a a", 4 / 9),
        (LoremIpsum(), "Lorem Ipsum lorem", 1),
        (CurlyBrackets(), "a {b} {", 2),
        (Sentences(), 'One. Two! "Three?" Four... five v. six\nSeven', 5),
        (Sentences(), 'Dr. No came. "Who?" He said so... and went\nSeven', 5),
        (Sentences(as_datatrove=True), 'Dr. No came. "Who?" He said so... and went\nSeven', 4),
        (EndedLines(), "a.\n\nb! \nc。\nd,", 3 / 4),
        (EndedLines(as_datatrove=True), "a.\n\nb! \nc。\nd,", 2 / 4),
        (ShortLines(), f"{'x' * 29}\n{'x' * 30}\n\n  a ", 2 / 3),
        (ShortLines(as_datatrove=True), f"{'x' * 30}\n{'x' * 31}\n\n  a ", 2 / 3),
        (RepeatedLineChars(), "a b\na b\ncd", 2 / 6),
        (RepeatedLineChars(as_datatrove=True), "a b\na b\ncd", 3 / 8),
        (NewlinesPerWord(), "a\nb\n\nc do.", 3 / 4),
        (NewlinesPerWord(as_datatrove=True), "a\nb\n\nc do.", 3 / 5),
    ],
)
def test_score_computed_by_hand(rule, text, score):
    assert rule(Text(text)).score == pytest.approx(score)


@pytest.mark.parametrize(
    ("rule", "at", "kept"),
    [(EndedLines(), 0.12, False), (ShortLines(), 0.67, False), (RepeatedLineChars(), 0.1, False)]
    + [
        (rule, threshold, True)
        for rule, threshold in zip(FineWeb.datatrove().rules(), (0.12, 0.67, 0.01, 0.3), strict=True)
    ],
)
def test_fineweb_rejects_at_the_threshold_itself_and_datatrove_does_not(rule, at, kept):
    assert rule.keeps(at) is kept


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("count_first", [False, True])
def test_repeated_ngrams_equal_brute_force(seed, count_first):
    """Few words, so that n-grams overlap themselves and each other; marks characters one n-gram at a time."""
    rng = random.Random(seed)
    words = rng.choices(["a", "bb", "ccc", "dd"][: 2 + seed % 3], k=rng.randint(0, 60))
    text, n_visible = Text(" ".join(words)), sum(map(len, words))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts, seen, inside = Counter(grams), set(), set()
        for i, gram in enumerate(grams):
            if counts[gram] > 1 and (count_first or gram in seen):
                inside.update(range(i, i + n))
            seen.add(gram)
        expected = sum(len(words[i]) for i in inside) / max(n_visible, 1)
        rule = DuplicateNgrams(n=n, threshold=1, count_first=count_first)
        assert rule.score(text) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(20))
def test_top_ngram_equals_brute_force(seed):
    rng = random.Random(seed)
    words = rng.choices(["a", "bb", "cccc", "dddddddd"], k=rng.randint(10, 40))
    for n in (2, 3, 4):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        if (most := max(counts.values())) == 1:
            continue
        length = max(len("".join(gram)) for gram in counts if counts[gram] == most)
        allowed = set()
        for top in (gram for gram in counts if counts[gram] == most and len("".join(gram)) == length):
            inside = {i + j for i, gram in enumerate(grams) if gram == top for j in range(n)}
            allowed.add(round(sum(len(words[i]) for i in inside) / len("".join(words)), 9))
        assert round(TopNgram(n=n, threshold=1).score(Text(" ".join(words))), 9) in allowed


@pytest.mark.parametrize(
    ("edit", "line", "kept"),
    [
        (C4Lines(), "Five words are just enough", True),
        (C4Lines(), "Four are too few", False),
        (C4Lines(), "Only four are left [1]", False),
        (C4Lines(as_datatrove=True), "Only four are left [1]", True),
        (C4Lines(), f"One word has not {'x' * 1001} length", False),
        (C4Lines(), f"One word has just {'x' * 1000} length", True),
        (C4Lines(), "Please enable JavaScript to see this", False),
        (C4Lines(), "This site uses cookies, as others do", False),
        (C4Lines(), "The JavaScript says lorem ipsum once more", True),  # for the rule that rejects the page
        (C4Lines(), "Our privacy policy for {name} of you", True),
        (C4Lines(), "The JavaScript for {name} of you all", False),
        (C4Lines(terminal_punctuation=True), "Five words without an end", False),
        (C4Lines(terminal_punctuation=True), 'She said: "That is enough."', True),
        (C4Lines(terminal_punctuation=True), "And so it went on...", False),
        (C4Lines(terminal_punctuation=True), "She said: 'That is enough.'", False),
        (C4Lines(terminal_punctuation=True, as_datatrove=True), "She said: 'That is enough.'", True),
    ],
)
def test_c4_keeps_or_drops_a_line(edit, line, kept):
    other = 'This line stays here, says "c4."'
    edited = edit.edit(Text(f"{other}\n  {line}\n\n{other}")).text.split("\n")
    assert len(edited) == 2 + kept
    assert edited[0] == edited[-1] == other


def test_c4_strips_citations_and_leaves_a_clean_text_alone():
    edited = C4Lines().edit(Text("Whales[12] are mammals[citation needed] of the sea[edit] and [not] fish."))
    assert edited.text == "Whales are mammals of the sea and [not] fish."
    assert C4Lines().edit(edited) is edited


@pytest.mark.parametrize("make", [Gopher, StopWords])
def test_datatrove_has_english_words_alone(make):
    with pytest.raises(ConfigError, match="language is 'de', but as_datatrove supports only English"):
        make(language="de", as_datatrove=True)


@pytest.mark.parametrize("make", [kind.datatrove for kind in (Gopher, GopherRepetition, C4, FineWeb)])
def test_missing_spacy_names_the_extra_before_a_text_is_read(monkeypatch, make):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[datatrove\]'"):
        make()


def test_a_preset_read_from_json_names_the_extra_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    spacy_words._pipeline.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'efftrain\[datatrove\]'"):
        judge(Gopher(as_datatrove=True).rules(), Text("one two"))


@pytest.mark.parametrize("make", [Gopher, StopWords])
def test_unknown_language_names_the_known_ones(make):
    with pytest.raises(ConfigError, match=r"language is 'xx'.*de, en, es, fr, it, nl, pt, or rules without StopWords"):
        make(language="xx")


SETS = (Gopher, GopherRepetition, C4, FineWeb)
PRESETS = [rules for kind in SETS for rules in (kind(), kind.datatrove())] + [GopherRepetition(count_first=True)]


@pytest.mark.parametrize("rule_set", PRESETS, ids=repr)
def test_set_survives_json_and_names_each_rule_once(rule_set):
    assert from_json(to_json(rule_set)) == rule_set
    names = [rule.name for rule in rule_set.rules()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("make", SETS)
def test_thresholds_leave_scoring_alone_and_semantics_do_not(make):
    # The edit of C4 and datatrove's additional rule of FineWeb are not thresholds.
    changed = {Gopher: {"min_words": 9}, GopherRepetition: {"max_duplicate_lines": 0.9}, C4: {"min_sentences": 9}}
    assert scoring([make(**changed.get(make, {"max_short_lines": 0.9}))]) == scoring([make()])
    assert scoring([make.datatrove()]) != scoring([make()])


N = 200_000
HARD = {
    "empty": "",
    "white space": " \n\t\r\n \x0b" * 9,
    "newlines": "\n" * N,
    "no word": "... !!! -- # {",
    "null bytes": "\0" * N + "\n\0 \0",
    "one word": "x" * N,
    "one line": "word " * (5_000_000 // 5),
    "identical lines": "the same line again and again\n" * (N // 30),
    "outside the plane": "🎉𝒳 " * (N // 3),
    "half a surrogate pair": "a \ud800 b\n" * 9,
    "dots": "." * N,
    "quotes": '."' * (N // 2),
    "brackets": "[1" * (N // 2),
    "long blank lines": ("\n" + " " * 1000) * (N // 1000),
}


@pytest.mark.parametrize("name", HARD)
def test_every_rule_bears_hard_texts(name):
    """What is not linear in the length would not end here."""
    for rule_set in PRESETS:
        text = Text(HARD[name][: 20_000 if getattr(rule_set, "as_datatrove", False) else None])  # spaCy is slow
        for rule in rule_set.rules():
            if is_edit(rule):
                text = rule.edit(text)
            else:
                score = rule(text).score
                assert isinstance(score, float)
                assert math.isfinite(score)
