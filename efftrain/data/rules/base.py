"""Defines rules, which score a text, and their thresholds, which can be changed without scoring again."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from efftrain.config import to_json
from efftrain.data.documents import Text, Verdict
from efftrain.errors import ConfigError, EfftrainError

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # in typing from Python 3.13 on


class Rule(Protocol):
    """The interface of a rule: a frozen dataclass that scores texts and keeps those with an acceptable score.

    The fields ``low``, ``high`` and ``threshold`` are thresholds; every other field may affect the score.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    def score(self, text: Text) -> float:
        """Returns the score of a text."""
        ...

    def keeps(self, score: float) -> bool:
        """Returns whether a text with this score is kept."""
        ...


@dataclass(frozen=True, kw_only=True)
class AtMost:
    """Base class of rules that keep a text whose score is at most ``threshold``; subclasses define name and score.

    Attributes:
      name: the name of the rule in tables and reports, unique in a corpus.
      threshold: the highest score at which a text is kept.
    """

    name: ClassVar[str]
    threshold: float

    def __init_subclass__(cls) -> None:
        if "limit" in vars(cls) and not hasattr(cls, "threshold"):  # as earlier versions called the threshold
            raise ConfigError(f"the field limit of the rule {cls.__name__} is now called threshold; rename it")

    def score(self, text: Text) -> float:
        raise NotImplementedError

    def keeps(self, score: float) -> bool:
        return score <= self.threshold

    def __call__(self, text: Text) -> Verdict:
        score = self.score(text)
        return Verdict(keep=self.keeps(score), rule=self.name, score=score)


@dataclass(frozen=True, kw_only=True)
class AtLeast(AtMost):
    """Base class of rules that keep a text if its score is at least ``threshold``; otherwise like ``AtMost``."""

    def keeps(self, score: float) -> bool:
        return score >= self.threshold


@dataclass(frozen=True, kw_only=True)
class Between:
    """Base class of rules that keep a text if its score is from ``low`` to ``high``, inclusive; see ``AtMost``."""

    name: ClassVar[str]
    low: float
    high: float

    score = AtMost.score
    __call__ = AtMost.__call__

    def keeps(self, score: float) -> bool:
        return self.low <= score <= self.high


def prefers_high(rule: Rule) -> bool:
    """Returns whether the larger of two scores is the better one: True for ``AtLeast``, False for ``AtMost``.

    Any other rule prefers the end of the scale that it keeps: a ``ScoreTable`` with only ``low`` prefers high scores,
    and one with only ``high`` prefers low scores.

    Raises:
      ConfigError: the rule keeps the middle of the scale, or both ends, and so prefers neither high nor low scores.
    """
    keeps_high, keeps_low = rule.keeps(math.inf), rule.keeps(-math.inf)
    if keeps_high != keeps_low:
        return keeps_high
    if isinstance(rule, AtMost):  # an infinite threshold keeps every score
        return isinstance(rule, AtLeast)
    raise ConfigError(
        f"corpus.quality is {rule.name!r}, which prefers neither high nor low scores; name a rule that keeps all above "
        "or all below a threshold (AtLeast, AtMost, or ScoreTable with only low or only high)"
    )


class RuleSet(Protocol):
    """The interface of a rule set: a frozen dataclass that expands to the rules and edits of one paper, in order."""

    def rules(self) -> "Sequence[Rule | Edit]":
        """Returns the rules and edits in the order in which they are applied."""
        ...


class Edit(Protocol):
    """The interface of an edit: a frozen dataclass that changes a text before the rules after it are applied."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str: ...

    def edit(self, text: Text) -> Text:
        """Returns the changed text, or the same object if nothing is changed."""
        ...


def flatten(rules: Iterable[Rule | RuleSet | Edit]) -> Iterator[Rule | Edit]:
    """Yields the rules and edits in order, with each rule set replaced by its members."""
    for rule in rules:
        if _is_rule_set(rule):
            yield from flatten(rule.rules())
        else:
            yield rule


def is_edit(rule: Rule | Edit) -> "TypeIs[Edit]":
    return hasattr(rule, "edit")


def _is_rule_set(rule: Rule | RuleSet | Edit) -> "TypeIs[RuleSet]":
    return hasattr(rule, "rules")


class RuleFailed(Exception):
    """Raised if a rule or an edit raises; the message is that of the original exception.

    Attributes:
      rule: the name of the rule or edit.
    """

    def __init__(self, rule: str, error: Exception):
        lines = str(error).strip().splitlines()
        super().__init__(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__)
        self.rule = rule


@dataclass(frozen=True)
class Judgement:
    """The result of applying a list of rules to a text.

    Attributes:
      text: the text after all edits.
      edited: the names of the edits that changed it.
      scores: the score of every rule by its name, including the rules after the one that rejects.
      verdict: the verdict of the first rule that rejects the text; None if all keep it.
    """

    text: Text
    edited: tuple[str, ...]
    scores: dict[str, float]
    verdict: Verdict | None


def judge(rules: Iterable[Rule | Edit], text: Text, known: Mapping[str, float] | None = None) -> Judgement:
    """Applies rules and edits to a text, in order.

    Args:
      rules: without rule sets, see ``flatten``.
      text: the text.
      known: the scores of all rules, if they were computed before; then only the edits are applied.

    Raises:
      RuleFailed: a rule raised an exception that is not an ``EfftrainError``.
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
        except Exception as error:  # a user's rule may raise anything
            raise RuleFailed(rule.name, error) from error
    return Judgement(text, tuple(edited), scores, verdict(rules, scores))


def verdict(rules: Iterable[Rule | Edit], scores: Mapping[str, float]) -> Verdict | None:
    """Compares scores with thresholds and returns the verdict of the first rule that rejects, or None."""
    for rule in rules:
        if not is_edit(rule) and not rule.keeps(score := scores[rule.name]):
            return Verdict(keep=False, rule=rule.name, score=score)
    return None


def scoring(rules: Iterable[Rule | RuleSet | Edit]) -> list[Any]:
    """Returns the scoring as JSON, without thresholds. Lists of rules with equal results can share scores."""
    return [_without_thresholds(rule) for rule in flatten(rules)]


def _without_thresholds(rule: Rule | Edit) -> Any:
    thresholds = () if is_edit(rule) else ("low", "high", "threshold")
    names = [f.name for f in dataclasses.fields(rule) if f.name not in thresholds]
    return {"type": to_json(rule)["type"]} | {name: to_json(getattr(rule, name)) for name in names}
