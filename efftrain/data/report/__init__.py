"""Writes an HTML report about a corpus: what was removed by which rule, and what a person should check.

The page is self-contained: it includes plotly, loads nothing from a network, and forbids that in its content security
policy. The corpus is only read, a batch of rows at a time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from efftrain.data.report.alerts import alarms
from efftrain.data.report.figures import RECALL_STEP, collision_curve, expected_recall, score_histogram
from efftrain.data.report.scores import Histogram, histograms, intervals, number
from efftrain.data.report.tables import REMOVED, LargestClusters, RandomRows, batches, count_removed, total, visible
from efftrain.data.storage.store import read_manifest
from efftrain.errors import ConfigError

REJECTS = 20  # number of removed documents that are shown for each rule
MAX_SOURCES = 100  # largest number of sources with statistics of their own on the page


def write_report(corpus: Path | str, out: Path | str | None = None, *, seed: int = 0) -> Path:
    """Writes the report of a corpus as an HTML page.

    Args:
      corpus: the folder of a corpus.
      out: the HTML file. None: ``NAME-report.html`` beside the folder.
      seed: seed of the choice of removed documents that are shown.

    Returns:
      The path of the page.

    Raises:
      CorpusError: there is no corpus, or one of its tables is missing or damaged.
      ConfigError: ``out`` is inside the folder of the corpus, which may only contain the files in its manifest; or it
        cannot be written.
    """
    corpus = Path(corpus)
    manifest = read_manifest(corpus)
    folder = corpus.resolve()
    out = Path(out) if out is not None else folder.with_name(f"{folder.name}-report.html")
    if out.resolve().is_relative_to(folder):
        raise ConfigError(f"--out {out} lies inside the corpus {corpus}; choose a path outside it")
    page = _render(_content(corpus, folder.name, manifest, seed))
    try:
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another path") from error
    return out


def _content(corpus: Path, name: str, manifest: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Returns the values that the template shows."""
    counts = count_removed(corpus)
    samples, clusters = RandomRows(REJECTS, seed), LargestClusters()
    for batch in batches(corpus, REMOVED):
        samples.add(batch)
        clusters.add(batch)
    kept = intervals(manifest["parameters"])
    rows, splits = manifest["funnel"], manifest["splits"]
    tokens_per_byte = _tokens_per_byte(splits)
    sources = sorted((manifest.get("sources") or {}).items(), key=lambda item: -item[1][0]["bytes"])
    rejected = samples.rows()
    stages = [row["stage"] for row in rows if row["stage"] in rejected]
    near = manifest.get("near_duplicates")
    return {
        "name": name,
        "manifest": manifest,
        "alarms": alarms(manifest),
        "funnel": filter_rows(rows, tokens_per_byte, _total(splits, "tokens")),
        "tokens_per_byte": tokens_per_byte,
        "n_sources": len(sources),
        "sources": [(source, filter_rows(part, tokens_per_byte)) for source, part in sources[:MAX_SOURCES]],
        "splits": splits,
        "split_bytes": _total(splits, "bytes"),
        "histograms": [_described(histogram, counts) for histogram in histograms(corpus, kept)],
        "near": near,
        "curve": collision_curve(near) if near else None,
        "recall": _recall(near) if near else [],
        "recall_step": RECALL_STEP,
        "clusters": clusters.clusters(),
        "rejects": [
            (rule, total(counts, rule=rule), kept.get(rule), rejected[rule])
            for rule in dict.fromkeys([*stages, *sorted(rejected, key=str)])
        ],
        "decontamination": manifest.get("decontamination") or {},
    }


def filter_rows(
    rows: Sequence[Mapping[str, Any]], tokens_per_byte: float | None, n_kept: int | None = None
) -> list[dict[str, Any]]:
    """Adds to the rows of filter statistics what is left after each stage.

    Args:
      rows: ``stage``, ``documents`` and ``bytes``: what was seen, what each stage drops, and what was kept.
      tokens_per_byte: mean of the kept documents, from which tokens are estimated. None: unknown.
      n_kept: number of kept tokens. None: unknown.

    Returns:
      Each row with ``drops`` (whether the stage drops documents), ``reached`` (documents before the stage), ``left``
      (documents after it), ``share`` (left divided by seen), ``tokens``, and whether these are ``estimated`` from the
      bytes.
    """
    seen = left = rows[0]["documents"]
    result = []
    for row in rows:
        drops = row["stage"] not in ("seen", "kept")
        reached, left = left, left - drops * row["documents"]
        counted = row["stage"] == "kept" and n_kept is not None
        estimate = None if tokens_per_byte is None else round(row["bytes"] * tokens_per_byte)
        tokens = n_kept if counted else estimate
        result.append(
            {**row, "drops": drops, "reached": reached, "left": left, "share": left / seen if seen else 0.0}
            | {"tokens": tokens, "estimated": not counted}
        )
    return result


def _tokens_per_byte(splits: Mapping[str, Mapping[str, int]]) -> float | None:
    n_bytes, n_tokens = _total(splits, "bytes"), _total(splits, "tokens")
    return n_tokens / n_bytes if n_bytes and n_tokens else None


def _total(splits: Mapping[str, Mapping[str, int]], unit: str) -> int:
    return sum(figures[unit] for figures in splits.values())


def _described(histogram: Histogram, counts: Mapping[tuple[str, str], int]) -> dict[str, Any]:
    return {
        "rule": histogram.rule,
        "interval": histogram.interval,
        "rejected": histogram.n_rejected,
        "scored": histogram.n_kept + histogram.n_rejected,
        "first": total(counts, rule=histogram.rule),
        "figure": score_histogram(histogram),
    }


def _recall(near: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the measured recall with the expected recall from the collision curve."""
    return [
        {**point, "expected": expected_recall(point["similarity"], near["bands"], near["rows"])}
        for point in near.get("recall") or ()
    ]


def _render(content: Mapping[str, Any]) -> str:
    import jinja2
    from plotly.offline import get_plotlyjs

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"visible": visible, "count": _count, "size": size, "percent": _percent, "score": _score}
    return environment.get_template("page.html").render(content, plotly=get_plotlyjs())


def size(n_bytes: float) -> str:
    """Formats a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 or not share else f"{100 * share:.2g}%"


def _score(value: float | None) -> str:
    return "–" if value is None else number(value)
