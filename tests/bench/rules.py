"""Megabytes of prose per second and core that the quality rules judge.

    python tests/bench/rules.py

The texts are what is prose among the installed distributions (.rst, .md, .txt, licences) and docstrings, cut into
documents of about 4 kB, one rule list over each: C4 (with its edit), Gopher, GopherRepetition, FineWeb. The last line
is JSON. Goal: 5 MB/s.
"""

import ast
import json
import platform
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from efftrain.data.documents import Text
from efftrain.data.rules import C4, FineWeb, Gopher, GopherRepetition, flatten, judge

GOAL = 5.0
SETS = {
    "c4": (C4(),),
    "gopher": (Gopher(),),
    "gopher_repetition": (GopherRepetition(),),
    "fineweb": (FineWeb(),),
    "all": (C4(), Gopher(), GopherRepetition(), FineWeb()),
}


def rule_speed(*, megabytes: float = 4.0, rounds: int = 5) -> dict:
    """Judges the same texts in each round with each set alone and with all; the median round counts.

    Returns:
      mb_per_s: of UTF-8 per second of processor time, all sets together; ``ratio`` of it to ``goal``; ``sets``: of
      each alone, where what the sets share is computed for it alone; ``documents`` and ``megabytes`` that were judged.
    """
    texts = list(_documents(int(megabytes * 1e6)))
    n_megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds = {name: [] for name in SETS}
    for _ in range(rounds):
        for name, sets in SETS.items():
            rules, started = tuple(flatten(sets)), time.process_time()
            for text in texts:
                judge(rules, Text(text))
            speeds[name].append(n_megabytes / (time.process_time() - started))
    medians = {name: round(statistics.median(rates), 2) for name, rates in speeds.items()}
    return {
        "mb_per_s": medians["all"],
        "ratio": round(medians["all"] / GOAL, 2),
        "goal": GOAL,
        "sets": medians,
        "documents": len(texts),
        "megabytes": round(n_megabytes, 2),
    }


def _documents(n_bytes: int, size: int = 4000) -> Iterator[str]:
    """Documents of about ``size`` characters, whole lines, until there are ``n_bytes``; the last cut is smaller."""
    for prose in _prose():
        lines, length = [], 0
        for line in prose.splitlines(keepends=True):
            lines.append(line)
            length += len(line)
            if length >= size:
                yield "".join(lines)
                n_bytes -= length
                lines, length = [], 0
        if length > size // 4:
            yield "".join(lines)
            n_bytes -= length
        if n_bytes <= 0:
            return


def _prose() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*")):
        if path.suffix in (".rst", ".md") or path.name.startswith(("LICENSE", "NOTICE", "METADATA")):
            if path.is_file():
                yield path.read_text(encoding="utf-8", errors="replace")
        elif path.suffix == ".py" and path.parent.name in ("numpy", "optax", "_src", "losses", "lib", "linen"):
            yield _docstrings(path)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return "\n\n".join(filter(None, (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))))


if __name__ == "__main__":
    print(f"{platform.platform()}, Python {platform.python_version()}")
    print(json.dumps(rule_speed()))
