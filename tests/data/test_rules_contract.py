"""What holds for rules whatever they measure: which end of the scores is better, and which rules are the default."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from efftrain.data import rules
from efftrain.data.documents import Text
from efftrain.data.rules import (
    C4,
    AtLeast,
    AtMost,
    Between,
    Code,
    FineWeb,
    Gopher,
    GopherRepetition,
    HashRatio,
    StopWords,
    WordCount,
    default_rules,
    flatten,
    is_edit,
    judge,
    prefers_high,
)
from efftrain.data.rules.score_table import ScoreTable
from efftrain.errors import ConfigError


@dataclass(frozen=True)
class OwnRule:
    """A rule without any of the base classes."""

    name: ClassVar[str] = "own"
    low: float = -math.inf
    high: float = math.inf

    def score(self, text: Text) -> float:
        return float(text.n_chars)

    def keeps(self, score: float) -> bool:
        return self.low <= score <= self.high


@dataclass(frozen=True, kw_only=True)
class Few(AtMost):
    name: ClassVar[str] = "few"


@dataclass(frozen=True, kw_only=True)
class Many(AtLeast):
    name: ClassVar[str] = "many"


def test_a_rule_that_names_its_threshold_as_before_is_told_the_new_name():
    with pytest.raises(ConfigError, match="the field limit of the rule Old is now called threshold; rename it"):

        @dataclass(frozen=True, kw_only=True)
        class Old(AtMost):
            limit: float = 1.0


def table(**thresholds: float) -> ScoreTable:
    return ScoreTable(
        table=Path("scores.parquet"), digest="0" * 32, **{"low": -math.inf, "high": math.inf} | thresholds
    )


@pytest.mark.parametrize(
    ("rule", "high"),
    [
        (HashRatio(), False),
        (StopWords(), True),
        (Few(threshold=math.inf), False),  # keeps everything: only its score is wanted
        (Many(threshold=-math.inf), True),
        (table(high=1.1), False),
        (table(low=0.4), True),
        (OwnRule(low=3), True),
        (OwnRule(high=3), False),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_better_end_of_the_scores_is_the_one_that_the_rule_keeps(rule, high):
    assert prefers_high(rule) is high


@pytest.mark.parametrize("rule", [WordCount(), table(low=0.4, high=1.1), table(), OwnRule(), OwnRule(low=1, high=2)])
def test_a_rule_that_prefers_neither_end_is_refused_in_one_sentence(rule):
    with pytest.raises(ConfigError, match=rf"corpus\.quality is '{rule.name}', which prefers neither") as error:
        prefers_high(rule)
    assert "\n" not in str(error.value)


def test_every_rule_of_the_package_has_a_direction_unless_it_keeps_a_middle():
    for rule in flatten((Code(), Gopher(), GopherRepetition(), C4(), FineWeb())):
        if not is_edit(rule) and not isinstance(rule, Between):
            assert prefers_high(rule) is isinstance(rule, AtLeast)


TEXTS = {
    "question": "How do I top up my card?",
    "essay": "On tides\n\nThe sea comes twice a day. Nobody calls it, and it never asks.\n",
    "docstring": "Return the sum of a and b.\n\n>>> add(1, 2)\n3\n",
    "article": " = Harbour = \n \n The harbour , which <unk> built in 1912 , is @-@ by size @-@ the third .\n",
    "answer": '{"answer": 7}',
    "other script": "数据处理 и обработка",
}


@pytest.mark.parametrize("name", TEXTS)
def test_default_rules_of_text_keep_whatever_is_text(name):
    judgement = judge(tuple(flatten(default_rules(["text", "text"]))), Text(TEXTS[name]))
    assert judgement.verdict is None
    assert judgement.text.text == TEXTS[name]


@pytest.mark.parametrize(("text", "rule"), [(" \n\t\n", "too_short"), ("", "too_short"), ("PK\3\4\0" * 9, "non_text")])
def test_default_rules_of_text_drop_what_is_none(text, rule):
    assert judge(tuple(flatten(default_rules(["text"]))), Text(text)).verdict.rule == rule


def test_default_rules_follow_the_kind():
    assert default_rules(["code"]) == (Code(),)
    assert {type(rule) for rule in default_rules(iter(["web"]))} == {Gopher, GopherRepetition, C4, FineWeb}
    menu = "Home\nNews\nShop\nAbout us\n" * 5
    assert judge(tuple(flatten(default_rules(["web"]))), Text(menu)).verdict is not None


@pytest.mark.parametrize(("kinds", "match"), [(["code", "text"], "code and text"), ([], "nothing"), (["pdf"], "'pdf'")])
def test_kinds_without_common_rules_name_the_field_to_set(kinds, match):
    with pytest.raises(ConfigError, match=rf"{match}.*corpus\.rules"):
        default_rules(kinds)


def test_every_public_name_of_the_rules_exists():
    assert all(hasattr(rules, name) for name in rules.__all__)
