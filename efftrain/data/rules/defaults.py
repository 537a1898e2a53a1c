"""The rules of a corpus that names none: they follow what its sources hold."""

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
    # What made FineWeb (Penedo et al. 2024, section 3), in its order: C4's rules but for the terminal punctuation.
    "web": (GopherRepetition(), Gopher(), C4(), FineWeb()),
    # Nothing is known of the text, a question of five words or a book: only blank and binary ones go.
    "text": (TooShort(limit=1), NonText()),
}


def default_rules(kinds: Iterable[str]) -> tuple[Rule | RuleSet | Edit, ...]:
    """The rules for sources of these kinds.

    Args:
      kinds: of each source: "code" for source code, "web" for pages of the web, "text" for any other text.

    Raises:
      ConfigError: the kinds differ or one is unknown.
    """
    distinct = sorted(set(kinds))
    if unknown := [kind for kind in distinct if kind not in _DEFAULTS]:
        raise ConfigError(f"a source has kind {unknown[0]!r}; use one of {', '.join(_DEFAULTS)}, or set corpus.rules")
    if len(distinct) != 1:
        held = " and ".join(distinct) or "nothing"
        raise ConfigError(f"the sources hold {held}, which has no common default rules; set corpus.rules")
    return _DEFAULTS[distinct[0]]
