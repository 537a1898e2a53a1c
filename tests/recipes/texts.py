"""A small corpus of made-up code."""

import random
from pathlib import Path
from typing import Any

from efftrain import data

WORDS = ("def", "return", "import", "class", "value", "number", "list", "print")
WORDS += ("for", "while", "if", "else", "in", "range", "self", "name")


def build_corpus(folder: Path, *, seed: int = 0, **options: Any) -> Path:
    """Writes the texts into a folder and builds the corpus beside them; ``options`` are of ``CorpusConfig``."""
    draw = random.Random(seed)
    for package in range(6):
        (folder / f"package{package}").mkdir(parents=True)
        for i in range(8):
            lines = [" ".join(draw.choices(WORDS, k=8)) for _ in range(30)]
            (folder / f"package{package}" / f"{i}.py").write_text("\n".join(lines) + "\n")
    out = folder.with_name(f"{folder.name}-corpus")
    source = data.TextFolder(path=folder, pattern="*.py", group_by_folder=True)
    data.build(data.CorpusConfig(sources=(source,), rules=(), **{"vocabulary": 300} | options), out)
    return out
