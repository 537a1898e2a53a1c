"""The scorecard: a row per model, a column per figure, and with each figure its unit and how it came about."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.box import SIMPLE_HEAD
from rich.table import Table

from efftrain.config import finite_json
from efftrain.errors import RunError

FILE_NAME = "scorecard.json"
Method = Literal["measured", "counted", "modelled", "unavailable"]

# What a comparison shows where nothing else is asked for: as much as fits on 100 columns.
HEADLINE = (
    "bpb",
    "parameters_active",
    "parameter_bytes",
    "train_flops",
    "decode_flops_per_token",
    "decode_s_per_token_b1",
    "peak_memory_bytes",
)


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
      value: None exactly where the method is "unavailable".
      unit: such as "bits/byte", "B", "s", "FLOP/token"; of an unavailable figure, the unit that it would have.
      method: "measured" on this machine, "counted" from the configuration, "modelled" from assumptions that the note
        names, or "unavailable".
      note: what the reader must know: conditions, spread, why it is missing.
      split: of the corpus, whose text was read; empty where none was.
    """

    value: float | None
    unit: str
    method: Method
    note: str = ""
    split: str = ""

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ValueError(f"a figure is {', '.join(get_args(Method))}, and not {self.method!r}")
        if (self.value is None) != (self.method == "unavailable"):
            raise ValueError(f"a figure with value {self.value} cannot be called {self.method}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.value} is no figure; use not_measured with a note that says what happened")


@dataclass(frozen=True)
class Scorecard:
    """The figures of one model, by name, and what they depend on (see ``train.run.directory.environment``)."""

    name: str
    figures: dict[str, Figure]
    environment: dict[str, Any]

    def value(self, figure: str) -> float:
        """The value of a figure; NaN where it was not measured."""
        value = self.figures[figure].value
        return math.nan if value is None else value

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all.

        Raises:
          RunError: the file cannot be written.
        """
        temporary = path.with_name(f".{path.name}.incomplete")
        try:
            temporary.write_text(json.dumps(finite_json(asdict(self)), indent=2, allow_nan=False) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(f"cannot write {path} ({error.strerror}); free the disk or choose another --out") from error

    @staticmethod
    def of(value: Any) -> "Scorecard":
        """Of what a card's file holds."""
        figures = {name: Figure(**figure) for name, figure in value["figures"].items()}
        return Scorecard(value["name"], figures, value["environment"])

    @staticmethod
    def read(path: Path) -> "Scorecard":
        """Reads what ``write`` wrote.

        Raises:
          RunError: there is no such file, or it is not a scorecard.
        """
        try:
            return Scorecard.of(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise RunError(f"there is no scorecard {path}; give the directory of a run that has finished") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not a scorecard ({error}); score the model again") from error


def not_measured(unit: str, note: str) -> Figure:
    """A figure that is missing, and why, or the command that would measure it."""
    return Figure(None, unit, "unavailable", note)


def table(scorecards: Sequence[Scorecard], figures: Sequence[str] = HEADLINE) -> Table:
    """For a person: of one model readable on 80 columns, of several on 100.

    Args:
      scorecards: one gives a row for each of its figures; several give a row for each model.
      figures: the columns where there are several models. A method that all of them share stands in the heading.
    """
    return _one(scorecards[0]) if len(scorecards) == 1 else _several(scorecards, figures)


def show(figure: Figure) -> str:
    """``12.3 ms``, ``295 kFLOP/token``, ``813k parameters``, ``1.4120 bits/byte``, ``0.8%``; or ``not measured``."""
    symbol, rest = _split_unit(figure.unit)
    return amount(figure) + ("" if figure.value is None or figure.unit == "share" else rest if symbol else f" {rest}")


def amount(figure: Figure) -> str:
    """The part of ``show`` that differs between models: ``12.3 ms``, ``295 kFLOP``, ``813k``, ``1.4120``."""
    if figure.value is None:
        return "not measured"
    if figure.unit == "share":
        return f"{figure.value:.1%}"
    if figure.unit in ("bits/byte", "nats/token"):
        return f"{figure.value:.4f}"
    symbol, _ = _split_unit(figure.unit)
    if symbol == "s" and figure.value >= 1000:
        return f"{figure.value:,.0f} s"
    digits, prefix = _scaled(figure.value)
    return f"{digits} {prefix}{symbol}" if symbol else f"{digits}{prefix}"


def _split_unit(unit: str) -> tuple[str, str]:
    """The symbol that takes an SI prefix, where the unit begins with one, and the rest of the unit."""
    symbol, slash, rest = unit.partition("/")
    return (symbol, slash + rest) if symbol in ("B", "s", "FLOP", "J") else ("", unit)


def _scaled(value: float) -> tuple[str, str]:
    """Three digits and an SI prefix from nano to exa."""
    for exponent, prefix in enumerate("nµm kMGTPE", start=-3):
        digits = f"{value / 1000.0**exponent:.3g}"
        if abs(float(digits)) < 1000 and (value != 0 or prefix == " "):
            return digits, prefix.strip()
    return f"{value / 1e18:.3g}", "E"


def _one(scorecard: Scorecard) -> Table:
    rows = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, title=scorecard.name, title_justify="left")
    for heading in ("figure", "value", "method"):
        rows.add_column(heading, no_wrap=True)
    rows.add_column("note")
    for name, figure in scorecard.figures.items():
        method = "-" if figure.value is None else figure.method
        note = "; ".join(filter(None, (figure.split and f"{figure.split} split", figure.note)))
        rows.add_row(name, show(figure), method, note, style="dim" if figure.value is None else "")
    return rows


def _several(scorecards: Sequence[Scorecard], names: Sequence[str]) -> Table:
    found = {name: [card.figures[name] for card in scorecards if name in card.figures] for name in names}
    notes = [f"{name}: not measured, {f.note}" for name in names for f in found[name] if f.value is None]
    rows = Table(
        box=SIMPLE_HEAD,
        padding=0,
        caption="\n".join(dict.fromkeys(notes)) or None,
        caption_justify="left",
    )
    rows.add_column("model", overflow="fold", min_width=12)
    methods = {name: {f.method for f in found[name] if f.value is not None} for name in names if found[name]}
    for name, used in methods.items():
        unit, splits = found[name][0].unit, sorted({f.split for f in found[name] if f.split})
        heading = [name.replace("_", " "), unit, *(used if len(used) == 1 else ()), " or ".join(splits)]
        rows.add_column("\n".join(filter(None, heading)), justify="right")
    for card in scorecards:
        cells = [(card.figures.get(name), len(used) > 1) for name, used in methods.items()]
        rows.add_row(card.name, *(_cell(figure, with_method) for figure, with_method in cells))
    return rows


def _cell(figure: Figure | None, with_method: bool) -> str:
    if figure is None:
        return "-"
    return f"{amount(figure)}\n{figure.method}" if with_method and figure.value is not None else amount(figure)
