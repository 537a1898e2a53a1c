"""Chooses the default rules of a corpus from the kind of its sources."""

from collections.abc import Iterable

from efftrain.data.rules.base import Edit, Rule, RuleSet
from efftrain.data.rules.c4 import C4
from efftrain.data.rules.code import Code, NonText, TooShort
from efftrain.data.rules.fineweb import FineWeb
from efftrain.data.rules.gopher import Gopher
from efftrain.data.rules.repetition import GopherRepetition
from efftrain.errors import ConfigError

_DEFAULTS: dict[str, tuple[Rule | RuleSet | Edit, ...]] = {
    "code": (Code(),),
    # The filters of FineWeb (Penedo et al. 2024, section 3) in order, with C4's rules except terminal punctuation.
    "web": (GopherRepetition(), Gopher(), C4(), FineWeb()),
    # A text may be anything from a question of five words to a book, so that only blank and binary ones are rejected.
    "text": (TooShort(threshold=1), NonText()),
}


def default_rules(kinds: Iterable[str]) -> tuple[Rule | RuleSet | Edit, ...]:
    """Returns the default rules for sources of the given kinds.

    Args:
      kinds: the kind of each source: "code" for source code, "web" for web pages, "text" for any other text.

    Raises:
      ConfigError: the kinds differ, or one is unknown.
    """
    distinct = sorted(set(kinds))
    if unknown := [kind for kind in distinct if kind not in _DEFAULTS]:
        raise ConfigError(f"a source has kind {unknown[0]!r}; use one of {', '.join(_DEFAULTS)}, or set corpus.rules")
    if len(distinct) != 1:
        held = " and ".join(distinct) or "nothing"
        raise ConfigError(f"the sources hold {held}, for which there are no default rules; set corpus.rules")
    return _DEFAULTS[distinct[0]]
