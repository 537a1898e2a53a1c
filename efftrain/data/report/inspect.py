"""Shows the removed documents of a corpus on the terminal, one at a time."""

import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from efftrain.data.report.scores import Interval, intervals, number
from efftrain.data.report.tables import REMOVED, RandomRows, batches, count_removed, total, visible
from efftrain.data.storage.store import read_manifest
from efftrain.errors import ConfigError, CorpusError

LIMIT = 20  # default number of documents for a random sample, or without a user at a terminal


def inspect_corpus(
    corpus: Path | str,
    *,
    rule: str | None = None,
    source: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
) -> None:
    """Pages through removed documents: Enter shows the next one, q ends. Without a terminal it prints them at once.

    Args:
      corpus: the folder of a corpus.
      rule: show only documents that this rule removed. None: all rules.
      source: show only documents of this source. None: all sources.
      seed: show a random sample of ``limit`` documents. None: show documents in the order of the table.
      limit: largest number of documents. None: 20 for a random sample or if stdin is not a terminal, otherwise all.

    Raises:
      CorpusError: there is no corpus or no table of removed documents, or no document was removed by ``rule`` from
        ``source``.
      ConfigError: ``limit`` is not positive.
    """
    corpus = Path(corpus)
    manifest = read_manifest(corpus)
    counts = count_removed(corpus)
    _check(corpus, counts, rule, source)
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit is {limit}; give a positive number")
    asks = sys.stdin.isatty()
    if limit is None and (seed is not None or not asks):
        limit = LIMIT
    if seed is None or limit is None:
        rows = _rows(corpus, rule, source)
    else:
        rows = _random_rows(corpus, rule, source, seed, limit)
    kept = intervals(manifest["parameters"])
    out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    n_found = total(counts, rule=rule, source=source)
    n_shown = n_found if limit is None else min(limit, n_found)
    for position, row in enumerate(islice(rows, n_shown), 1):
        out.print(_title(position, n_shown, n_found), style="dim")
        out.print(describe(row, kept.get(row["rule"])))
        if asks and position < n_shown and not _goes_on(out):
            return


def describe(row: Mapping[str, Any], interval: Interval | None) -> Text:
    """Describes a removed document: its id, the reason of its removal, and an excerpt or a diff to the kept one."""
    text = Text()
    text.append(visible(row["id"]), style="bold").append(f"  {visible(row['source'])}, {row['bytes']:,} bytes\n")
    text.append(visible(row["rule"]), style="red")
    if row["score"] is not None:
        text.append(f"  score {number(row['score'])}" + (f", {interval}" if interval else ""))
    if row.get("cluster") is not None:
        text.append(f"  similarity estimated {number(row['estimated'])}, {row['bands']} bands agree, ")
        text.append(f"{row['cluster_size']:,} documents in cluster {visible(row['cluster'])}")
    if row["survivor"] is not None:
        text.append("\nkept in its place: ").append(visible(row["survivor"]), style="green")
    text.append("\n\n")
    for line in visible(row.get("diff") or row["excerpt"]).splitlines():
        heads = {"+++": "dim", "---": "dim", "@@ ": "dim"}
        style = heads.get(line[:3]) or {"+": "green", "-": "red"}.get(line[:1]) if row.get("diff") else None
        text.append(f"  {line}\n", style=style)
    return text


def _check(corpus: Path, counts: Mapping[tuple[str, str], int], rule: str | None, source: str | None) -> None:
    if total(counts, rule=rule, source=source):
        return
    if not counts:
        raise CorpusError(f"no document was removed from {corpus}; there is nothing to inspect")
    rules, sources = (sorted({key[i] for key in counts}) for i in (0, 1))
    if rule is not None and rule not in rules:
        found = ", ".join(f"{name} ({total(counts, rule=name):,})" for name in rules)
        raise CorpusError(f"no document of {corpus} was removed by rule {rule!r}; choose one of {found}")
    wanted = f"of source {source!r} was removed" + (f" by {rule}" if rule else "")
    found = ", ".join(name for name in sources if total(counts, rule=rule, source=name))
    raise CorpusError(f"no document {wanted}; choose one of {found}")


def _rows(corpus: Path, rule: str | None, source: str | None) -> Iterator[dict[str, Any]]:
    for batch in _matching(corpus, rule, source):
        for start in range(0, batch.num_rows, 64):
            yield from batch.slice(start, 64).to_pylist()


def _random_rows(corpus: Path, rule: str | None, source: str | None, seed: int, limit: int) -> Iterator[dict[str, Any]]:
    chosen = RandomRows(limit, seed, group=None)
    for batch in _matching(corpus, rule, source):
        chosen.add(batch)
    yield from chosen.rows().get(None, ())


def _matching(corpus: Path, rule: str | None, source: str | None) -> Iterator[Any]:
    import pyarrow.compute as pc  # makes its functions when it is imported

    for batch in batches(corpus, REMOVED):
        for column, value in (("rule", rule), ("source", source)):
            if value is not None:
                batch = batch.filter(pc.equal(batch.column(column), value))  # ty: ignore[missing-attribute]  # as above
        yield batch


def _title(position: int, n_shown: int, n_found: int) -> str:
    return f"{position:,} of {n_shown:,}" + (f" (of {n_found:,} removed)" if n_shown < n_found else "")


def _goes_on(out: Console) -> bool:
    try:
        return not out.input("Enter: next, q: quit ").strip().lower().startswith("q")
    except (EOFError, KeyboardInterrupt):
        return False
