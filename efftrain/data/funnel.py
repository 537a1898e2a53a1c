"""How many documents came in, where they were lost, and how many are left."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from efftrain.errors import CorpusError


class Funnel:
    """Documents and bytes: seen, dropped by each rule, kept."""

    def __init__(self):
        self._seen, self._dropped = [0, 0], {}

    def see(self, n_bytes: int) -> None:
        self._seen = [self._seen[0] + 1, self._seen[1] + n_bytes]

    def drop(self, rule: str, n_bytes: int) -> None:
        documents, size = self._dropped.get(rule, (0, 0))
        self._dropped[rule] = documents + 1, size + n_bytes

    def cut(self, rule: str, n_bytes: int) -> None:
        """Text that went out of documents which stay; negative where an edit made them longer."""
        documents, size = self._dropped.get(rule, (0, 0))
        self._dropped[rule] = documents, size + n_bytes

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds what ``to_json`` of another gave."""
        self._seen = [a + b for a, b in zip(self._seen, counts["seen"], strict=True)]
        for rule, (documents, n_bytes) in counts["dropped"].items():
            before = self._dropped.get(rule, (0, 0))
            self._dropped[rule] = before[0] + documents, before[1] + n_bytes

    def to_json(self) -> dict[str, Any]:
        return {"seen": self._seen, "dropped": {rule: list(count) for rule, count in self._dropped.items()}}

    def check_something_left(self, n_documents: int) -> None:
        if n_documents:
            return
        if not self._seen[0]:
            raise CorpusError("the sources hold no document; check their paths and patterns")
        rule, (documents, _) = max(self._dropped.items(), key=lambda item: item[1])
        raise CorpusError(
            f"no document is left: of {self._seen[0]:,}, rule {rule!r} removed most ({documents:,}); loosen it or "
            "check the sources"
        )

    def rows(self, order: Sequence[str] = ()) -> list[dict]:
        """Seen, dropped, kept. What ``order`` does not name comes first: what could not be read."""
        place = {name: i for i, name in enumerate(order)}
        kept = [seen - sum(d[i] for d in self._dropped.values()) for i, seen in enumerate(self._seen)]
        dropped = sorted(self._dropped.items(), key=lambda item: place.get(item[0], -1))
        table = [("seen", self._seen), *dropped, ("kept", kept)]
        return [{"stage": stage, "documents": int(d), "bytes": int(b)} for stage, (d, b) in table]


def funnel_table(title: str, funnel: list[dict[str, Any]], splits: dict[str, dict[str, int]]) -> Table:
    """The rows of a funnel, then the splits with their tokens."""
    seen = max(funnel[0]["documents"], 1)
    table = Table(title=title, title_justify="left")
    for name in ("stage", "documents", "share", "bytes", "tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in funnel:
        table.add_row(row["stage"], f"{row['documents']:,}", f"{row['documents'] / seen:.1%}", f"{row['bytes']:,}", "")
    table.add_section()
    for split, figures in splits.items():
        share = f"{figures['documents'] / seen:.1%}"
        table.add_row(split, f"{figures['documents']:,}", share, f"{figures['bytes']:,}", f"{figures['tokens']:,}")
    return table
