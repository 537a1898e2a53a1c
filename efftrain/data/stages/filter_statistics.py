"""Counts the documents that were read, removed by each rule and kept, in total and per source."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.table import Table

from efftrain.data.stages.exclusion_log import clean
from efftrain.errors import CorpusError


class FilterCounts:
    """Counts of documents and bytes seen, dropped by each rule and kept, with the first document of each rule."""

    def __init__(self):
        self._seen, self._dropped, self._examples = [0, 0], {}, {}

    def see(self, n_bytes: int) -> None:
        self._seen = [self._seen[0] + 1, self._seen[1] + n_bytes]

    def drop(self, rule: str, n_bytes: int, example: str) -> None:
        """Counts a dropped document; ``example`` describes it by its id and its content or error."""
        documents, size = self._dropped.get(rule, (0, 0))
        self._dropped[rule] = documents + 1, size + n_bytes
        self._examples.setdefault(rule, example)

    def cut(self, rule: str, n_bytes: int) -> None:
        """Counts bytes that were removed from a kept document; negative if an edit made it longer."""
        documents, size = self._dropped.get(rule, (0, 0))
        self._dropped[rule] = documents, size + n_bytes

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds the counts of another one, given as the result of its ``to_json``."""
        self._seen = [a + b for a, b in zip(self._seen, counts["seen"], strict=True)]
        for rule, (documents, n_bytes) in counts["dropped"].items():
            before = self._dropped.get(rule, (0, 0))
            self._dropped[rule] = before[0] + documents, before[1] + n_bytes
        self._examples = counts["examples"] | self._examples

    def to_json(self) -> dict[str, Any]:
        dropped = {rule: list(count) for rule, count in self._dropped.items()}
        return {"seen": self._seen, "dropped": dropped, "examples": self._examples}

    def check_something_left(self, n_documents: int, rules: Collection[str]) -> None:
        """Raises CorpusError if no document is left; ``rules`` are the names of the configured rules."""
        if n_documents:
            return
        if not self._seen[0]:
            raise CorpusError("the sources hold no document; check their paths and patterns")
        rule, (documents, _) = max(self._dropped.items(), key=lambda item: item[1])
        remedy = "loosen it, or set corpus.rules" if rule in rules else "check the source"
        raise CorpusError(
            f"no document is left: of {self._seen[0]:,}, {rule!r} removed most ({documents:,}), such as "
            f"{self._examples[rule]}; {remedy}"
        )

    def rows(self, order: Sequence[str] = ()) -> list[dict]:
        """Returns rows for seen, each dropping rule and kept. Rules not in ``order`` (unreadable items) come first."""
        place = {name: i for i, name in enumerate(order)}
        kept = [seen - sum(d[i] for d in self._dropped.values()) for i, seen in enumerate(self._seen)]
        dropped = sorted(self._dropped.items(), key=lambda item: place.get(item[0], -1))
        table = [("seen", self._seen), *dropped, ("kept", kept)]
        rows = [{"stage": stage, "documents": int(d), "bytes": int(b)} for stage, (d, b) in table]
        return [row | ({"example": self._examples[s]} if (s := row["stage"]) in self._examples else {}) for row in rows]


class FilterStatistics:
    """The counts of each source."""

    def __init__(self):
        self._of: dict[str, FilterCounts] = {}

    def see(self, source: str, n_bytes: int) -> None:
        self._of.setdefault(clean(source), FilterCounts()).see(n_bytes)

    def drop(self, source: str, rule: str, n_bytes: int, example: str) -> None:
        self._of.setdefault(clean(source), FilterCounts()).drop(rule, n_bytes, clean(example))

    def cut(self, source: str, rule: str, n_bytes: int) -> None:
        self._of.setdefault(clean(source), FilterCounts()).cut(rule, n_bytes)

    def add(self, counts: Mapping[str, Any]) -> None:
        """Adds other counts, given as the result of ``to_json``."""
        for source, count in counts.items():
            self._of.setdefault(source, FilterCounts()).add(count)

    def to_json(self) -> dict[str, Any]:
        return {source: counts.to_json() for source, counts in self._of.items()}

    def rows(self, order: Sequence[str]) -> dict[str, list[dict]]:
        return {source: counts.rows(order) for source, counts in self._of.items()}

    def total(self) -> FilterCounts:
        """Returns the sum of all sources."""
        total = FilterCounts()
        for counts in self._of.values():
            total.add(counts.to_json())
        return total


def example(id: str, text: str) -> str:
    """Describes a document by its id and its beginning, on one line, as an example of what a rule drops."""
    shown = " ".join(text[:400].split())
    return f"{id} ({shown[:80]}{'...' if len(shown) > 80 else ''})"


def filter_table(title: str, rows: list[dict[str, Any]], splits: dict[str, dict[str, int]]) -> Table:
    """Returns a table of the filter statistics, followed by the splits with their tokens."""
    seen = max(rows[0]["documents"], 1)
    table = Table(title=title, title_justify="left")
    for name in ("stage", "documents", "share", "bytes", "tokens"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        table.add_row(row["stage"], f"{row['documents']:,}", f"{row['documents'] / seen:.1%}", f"{row['bytes']:,}", "")
    table.add_section()
    for split, figures in splits.items():
        share = f"{figures['documents'] / seen:.1%}"
        table.add_row(split, f"{figures['documents']:,}", share, f"{figures['bytes']:,}", f"{figures['tokens']:,}")
    return table
