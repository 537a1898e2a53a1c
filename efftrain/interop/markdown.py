"""Text of a run as Markdown and YAML: names and notes that anybody chose are text there, never markup."""

import json
import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*\[\]<>|#~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")  # a_b has no emphasis
_PLAIN_YAML = re.compile(r"[A-Za-z][\w./-]*\Z", re.ASCII)
_WORDS_OF_YAML = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def one_line(text: object) -> str:
    """Returns the text with every run of white space and unprintable characters as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def plain(text: object) -> str:
    """Returns the text as plain text of a paragraph, list or table."""
    return _MARKUP.sub(r"\\\1", one_line(text))


def code(text: object) -> str:
    """Returns the text as code within a line, whatever it holds; in a table, give it to ``table``."""
    line = one_line(text) or " "
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{fence}{space}{line}{space}{fence}"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table of cells that are Markdown already; numbers, which are right-aligned, begin with a digit."""
    columns = list(zip(*rows, strict=True))
    marks = ["---:" if all(cell[:1].isdigit() or not cell for cell in column) else "---" for column in columns]
    lines = [heading, marks, *rows]
    # A bar ends a cell even within code, unless it is escaped; ``plain`` has escaped its own.
    return "\n".join("| " + " | ".join(re.sub(r"(?<!\\)\|", r"\\|", cell) for cell in line) + " |" for line in lines)


def yaml(fields: dict[str, str | Sequence[str] | None]) -> str:
    """Returns texts and lists of texts as YAML; fields that are None or empty are left out."""
    lines = []
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {_scalar(value)}")
        elif value:
            lines += [f"{name}:", *(f"- {_scalar(entry)}" for entry in value)]
    return "\n".join(lines)


def _scalar(text: str) -> str:
    line = one_line(text)
    if _PLAIN_YAML.match(line) and line.lower() not in _WORDS_OF_YAML:
        return line
    return json.dumps(line, ensure_ascii=False)
