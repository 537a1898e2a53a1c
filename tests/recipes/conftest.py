import random
from pathlib import Path

import pytest

from efftrain import data


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    words = [
        "def",
        "return",
        "import",
        "class",
        "value",
        "number",
        "list",
        "print",
        "for",
        "while",
        "if",
        "else",
        "in",
        "range",
        "self",
        "name",
    ]
    for package in range(6):
        (folder / f"package{package}").mkdir()
        for i in range(8):
            lines = [" ".join(draw.choices(words, k=8)) for _ in range(30)]
            (folder / f"package{package}" / f"{i}.py").write_text("\n".join(lines) + "\n")
    out = tmp_path_factory.mktemp("corpora") / "small"
    source = data.TextFolder(path=folder, pattern="*.py", package_by_folder=True)
    data.build(data.CorpusConfig(sources=(source,), rules=(), vocabulary=300), out)
    return out
