"""Rules and edits, one file a paper or topic. See ``base`` for what a rule is."""

from efftrain.data.rules.base import (
    AtLeast,
    AtMost,
    Between,
    Edit,
    Judgement,
    Rule,
    RuleSet,
    flatten,
    judge,
    scoring,
    verdict,
)
from efftrain.data.rules.code import (
    Code,
    FewLetters,
    Generated,
    LongLine,
    LongLines,
    NonText,
    TableLike,
    TooLong,
    TooShort,
)

__all__ = [
    "AtLeast",
    "AtMost",
    "Between",
    "Code",
    "Edit",
    "FewLetters",
    "Generated",
    "Judgement",
    "LongLine",
    "LongLines",
    "NonText",
    "Rule",
    "RuleSet",
    "TableLike",
    "TooLong",
    "TooShort",
    "flatten",
    "judge",
    "scoring",
    "verdict",
]
