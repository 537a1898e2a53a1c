"""``efftrain corpus``: what a corpus was made of, and what was removed from it."""

from pathlib import Path


def report(dir: Path, /, *, out: Path | None = None) -> None:
    """Write one HTML page that works offline: filter statistics, scores, near duplicates, removed documents, alerts.

    Args:
      dir: the folder of the corpus.
      out: the file to write; by default NAME-report.html beside the folder.
    """
    from efftrain.data.report import write_report

    print(write_report(dir, out))


def inspect(
    dir: Path,
    /,
    *,
    rule: str | None = None,
    source: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
) -> None:
    """Page through the documents that were removed from a corpus.

    Args:
      dir: the folder of the corpus.
      rule: show only documents that this rule removed.
      source: show only documents of this source.
      seed: show a random sample instead of the first documents; another seed gives another sample.
      limit: number of documents to show; by default 20 with a seed or if stdin is not a terminal, otherwise all.
    """
    from efftrain.data.report.inspect import inspect_corpus

    inspect_corpus(dir, rule=rule, source=source, seed=seed, limit=limit)
