"""What a rule is: a score of a text, and apart from it the threshold, which can be changed without scoring again."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from efftrain.config import to_json
from efftrain.data.documents import Text, Verdict
from efftrain.errors import ConfigError, EfftrainError


class Rule(Protocol):
    """A frozen dataclass. The fields ``low``, ``high`` and ``limit`` are thresholds; any other decides the score."""

    name: ClassVar[str]

    def score(self, text: Text) -> float: ...

    def keeps(self, score: float) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class AtMost:
    """A rule that keeps a text where its score is at most ``limit``."""

    name: ClassVar[str]
    limit: float

    def score(self, text: Text) -> float:
        raise NotImplementedError

    def keeps(self, score: float) -> bool:
        return score <= self.limit

    def __call__(self, text: Text) -> Verdict:
        score = self.score(text)
        return Verdict(keep=self.keeps(score), rule=self.name, score=score)


@dataclass(frozen=True, kw_only=True)
class AtLeast(AtMost):
    """A rule that keeps a text where its score is at least ``limit``."""

    def keeps(self, score: float) -> bool:
        return score >= self.limit


@dataclass(frozen=True, kw_only=True)
class Between:
    """A rule that keeps a text where its score lies from ``low`` to ``high``, both included."""

    name: ClassVar[str]
    low: float
    high: float

    score = AtMost.score
    __call__ = AtMost.__call__

    def keeps(self, score: float) -> bool:
        return self.low <= score <= self.high


def prefers_high(rule: Rule) -> bool:
    """Whether the larger of two scores is the better one: True for ``AtLeast``, False for ``AtMost``.

    Of any other rule, the end of the scores that it keeps is the better one: a ``ScoreTable`` with ``low`` alone
    prefers high scores, with ``high`` alone low ones.

    Raises:
      ConfigError: the rule keeps the middle, or both ends, so no score is better for being larger or smaller.
    """
    keeps_high, keeps_low = rule.keeps(math.inf), rule.keeps(-math.inf)
    if keeps_high != keeps_low:
        return keeps_high
    if isinstance(rule, AtMost):  # with a limit that keeps everything
        return isinstance(rule, AtLeast)
    raise ConfigError(
        f"corpus.quality is {rule.name!r}, which prefers neither high nor low scores; name a rule that keeps all above "
        "or all below a limit (AtLeast, AtMost, or ScoreTable with only low or only high)"
    )


class RuleSet(Protocol):
    """A frozen dataclass that stands for the rules and edits of one paper, in their order."""

    def rules(self) -> "Sequence[Rule | Edit]": ...


class Edit(Protocol):
    """A frozen dataclass that changes a text; the rules after it see the changed one."""

    name: ClassVar[str]

    def edit(self, text: Text) -> Text:
        """The changed text, or the same object where nothing is changed."""


def flatten(rules: Iterable[Rule | RuleSet | Edit]) -> Iterator[Rule | Edit]:
    """Yields the rules and edits with each set in pieces."""
    for rule in rules:
        if hasattr(rule, "rules"):
            yield from flatten(rule.rules())
        else:
            yield rule


def is_edit(rule: Rule | Edit) -> bool:
    return hasattr(rule, "edit")


class RuleFailed(Exception):
    """A rule or an edit raised; the message is what it raised.

    Attributes:
      rule: its name.
    """

    def __init__(self, rule: str, error: Exception):
        lines = str(error).strip().splitlines()
        super().__init__(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__)
        self.rule = rule


@dataclass(frozen=True)
class Judgement:
    """What a list of rules made of a text.

    Attributes:
      text: after all edits.
      edited: the names of the edits that changed it.
      scores: name of the rule -> score, for every rule, also behind the one that rejects.
      verdict: of the first rule that rejects; None where all keep the text.
    """

    text: Text
    edited: tuple[str, ...]
    scores: dict[str, float]
    verdict: Verdict | None


def judge(rules: Iterable[Rule | Edit], text: Text, known: Mapping[str, float] | None = None) -> Judgement:
    """Applies flattened rules in their order.

    Args:
      known: the scores of all rules, where they were computed before; then only the edits are done.

    Raises:
      RuleFailed: a rule raised something else than an ``EfftrainError``.
    """
    edited, scores = [], dict(known or {})
    for rule in rules:
        try:
            if is_edit(rule):
                changed = rule.edit(text)
                if changed is not text:
                    edited.append(rule.name)
                text = changed
            elif known is None:
                scores[rule.name] = rule.score(text)
        except EfftrainError:
            raise
        except Exception as error:  # a rule may be anybody's
            raise RuleFailed(rule.name, error) from error
    return Judgement(text, tuple(edited), scores, verdict(rules, scores))


def verdict(rules: Iterable[Rule | Edit], scores: Mapping[str, float]) -> Verdict | None:
    """Compares scores with thresholds: the verdict of the first rule that rejects, or None."""
    for rule in rules:
        if not is_edit(rule) and not rule.keeps(score := scores[rule.name]):
            return Verdict(keep=False, rule=rule.name, score=score)
    return None


def scoring(rules: Iterable[Rule | RuleSet | Edit]) -> list[Any]:
    """JSON that stands for how texts are scored: two lists of rules with the same can share scores."""
    return [_without_thresholds(rule) for rule in flatten(rules)]


def _without_thresholds(rule: Rule | Edit) -> Any:
    thresholds = () if is_edit(rule) else ("low", "high", "limit")
    names = [f.name for f in dataclasses.fields(rule) if f.name not in thresholds]
    return {"type": to_json(rule)["type"]} | {name: to_json(getattr(rule, name)) for name in names}
