"""A corpus folder written by hand, with tables and manifest that agree: what report and inspector read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HOSTILE = "<script>alert(1)</script> & \"quotes\" '</pre>' \x1b[31mred\x07"
CODE = "efftrain.data.rules.code"
PARAMETERS = {
    "type": "efftrain.data.corpus:CorpusConfig",
    "rules": [
        {"type": f"{CODE}:TooShort", "limit": 64},
        {"type": f"{CODE}:TableLike", "limit": 0.35},
        {"type": "mine.py:Secret", "limit": 3},
    ],
    "split": {"type": "efftrain.data.splits:SplitByPackage", "validation": 0.05, "test": 0.0, "seed": 0},
}
REMOVED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("rule", pa.string()),
        ("score", pa.float64()),
        ("survivor", pa.string()),
        ("bytes", pa.int64()),
        ("excerpt", pa.string()),
        ("estimated", pa.float32()),
        ("bands", pa.int32()),
        ("cluster", pa.string()),
        ("cluster_size", pa.int32()),
        ("diff", pa.string()),
    ]
)


def removed_row(id, rule, score=None, source="web", **more):
    row = dict.fromkeys(REMOVED.names) | {"id": id, "source": source, "rule": rule, "score": score, "bytes": 100}
    return row | {"excerpt": f"text of {id}"} | more


def near_duplicate(id, cluster, size, diff=None, source="web"):
    more = {"survivor": f"{cluster}/kept", "estimated": 0.875, "bands": 9, "cluster": cluster, "cluster_size": size}
    return removed_row(id, "near_duplicate", 0.9, source, diff=diff, **more)


def rejects():
    """40 too short, 25 like tables, clusters of 2 to 15 documents."""
    short = [removed_row(f"short{n:02d}", "too_short", float(n), excerpt=f"{n} {HOSTILE}") for n in range(40)]
    tables = [removed_row(f"table{n:02d}", "table_like", 0.4 + n / 100, "books") for n in range(25)]
    diff = f"--- kept\n+++ removed\n@@ -1,2 +1,2 @@\n same\n-{HOSTILE}\n+new"
    near = [
        near_duplicate(f"near{size:02d}-{n:02d}", f"cluster{size:02d}", size, diff if n in (1, 2) else None)
        for size in range(2, 16)
        for n in range(size - 1)
    ]
    return short + tables + near


def funnel(rows, n_seen, each=100):
    """Funnel of ``n_seen`` documents of ``each`` bytes from which the rows were removed."""
    stages = {}
    for row in rows:
        stages[row["rule"]] = stages.get(row["rule"], 0) + 1
    table = [("seen", n_seen), *stages.items(), ("kept", n_seen - len(rows))]
    return [{"stage": stage, "documents": n, "bytes": n * each} for stage, n in table]


def scores(n, seed=0):
    """Column -> values for n documents."""
    rng = np.random.default_rng(seed)
    return {
        "too_short": rng.lognormal(7, 2, n).astype(np.float32).round(),
        "table_like": rng.beta(2, 12, n).astype(np.float32),
        "mine/secret": rng.normal(size=n).astype(np.float32),
    }


def write(folder: Path, *, rows=None, columns=None, row_group=100, **manifest) -> Path:
    """Writes the folder; ``manifest`` replaces entries of it."""
    rows = rejects() if rows is None else rows
    columns = scores(1000) if columns is None else columns
    n = len(next(iter(columns.values()))) if columns else 1000
    sources = {name: [row for row in rows if row["source"] == name] for name in ("web", "books")}
    seen = {"web": n - n // 2, "books": n // 2}
    content = {
        "format": 1,
        "parameters": PARAMETERS,
        "inputs": [],
        "funnel": funnel(rows, n),
        "sources": {name: funnel(part, seen[name]) for name, part in sources.items()},
        "splits": {
            "train": {"documents": n - len(rows) - 50, "bytes": (n - len(rows) - 50) * 100, "tokens": 20_000},
            "validation": {"documents": 50, "bytes": 5_000, "tokens": 1_250},
        },
        "near_duplicates": {
            "bands": 14,
            "rows": 8,
            "threshold": 0.75,
            "n_permutations": 112,
            "candidates": 512,
            "removed": 105,
            "clusters": 14,
            "largest_bucket": 15,
            "oversized_buckets": 0,
            "recall": [
                {"similarity": 0.5, "pairs": 40, "found": 2},
                {"similarity": 0.7, "pairs": 40, "found": 23},
                {"similarity": 0.8, "pairs": 40, "found": 37},
                {"similarity": 0.9, "pairs": 40, "found": 40},
            ],
            "canary": {"planted": 32, "found": 32},
        },
        "repeated_lines": None,
        "decontamination": {
            "validation": {"documents": 50, "removed": 2},
            "gsm8k": {"documents": 1319, "short": 7, "removed": 3},
        },
        "files": {},
    }
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(content | manifest))
    pq.write_table(pa.Table.from_pylist(rows, REMOVED), folder / "removed.parquet", row_group_size=row_group)
    fixed = {
        "id": [f"d{i}" for i in range(n)],
        "source": ["web"] * n,
        "bytes": np.full(n, 100),
        "rejected_by": pa.array([None] * n, pa.string()),
    }
    pq.write_table(pa.table({**fixed, **columns}), folder / "scores.parquet", row_group_size=row_group)
    return folder
