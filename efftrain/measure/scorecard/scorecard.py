"""The scorecard of a model: its figures with unit, method and note, as JSON and as a table."""

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

# The figures that a comparison shows by default; they fit into 100 characters.
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
    """One figure of a scorecard.

    Attributes:
      value: the value; None if and only if the method is "unavailable".
      unit: such as "bits/byte", "B", "s", "FLOP/token"; an unavailable figure has the unit that it would have.
      method: "measured" on this machine, "counted" from the configuration, "modelled" from assumptions that the note
        names, or "unavailable".
      note: what the reader must know, such as conditions, the spread, or why the figure is missing.
      split: split of the corpus whose text was read; empty if no text was read.
    """

    value: float | None
    unit: str
    method: Method
    note: str = ""
    split: str = ""

    def __post_init__(self):
        if self.method not in get_args(Method):
            raise ValueError(f"the method of a figure is {self.method!r}; use one of {', '.join(get_args(Method))}")
        if (self.value is None) != (self.method == "unavailable"):
            raise ValueError(f"a figure with value {self.value} cannot have the method {self.method}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"{self.value} is not finite; use not_measured with a note that says what happened")


@dataclass(frozen=True)
class Scorecard:
    """The figures of one model by name, and the environment in which they were obtained.

    Attributes:
      name: name of the model.
      figures: the figures, by name.
      environment: see ``train.run.directory.environment``.
    """

    name: str
    figures: dict[str, Figure]
    environment: dict[str, Any]

    def value(self, figure: str) -> float:
        """The value of a figure; NaN if it was not measured."""
        value = self.figures[figure].value
        return math.nan if value is None else value

    def write(self, path: Path) -> None:
        """Writes the scorecard as JSON, atomically.

        Raises:
          RunError: the file cannot be written.
        """
        temporary = path.with_name(f".{path.name}.incomplete")
        try:
            temporary.write_text(json.dumps(finite_json(asdict(self)), indent=2, allow_nan=False) + "\n")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunError(
                f"cannot write {path} ({error.strerror}); free disk space or choose another --out"
            ) from error

    @staticmethod
    def of(value: Any) -> "Scorecard":
        """Makes a scorecard from the JSON value of its file."""
        figures = {name: Figure(**figure) for name, figure in value["figures"].items()}
        return Scorecard(value["name"], figures, value["environment"])

    @staticmethod
    def read(path: Path) -> "Scorecard":
        """Reads a scorecard that ``write`` wrote.

        Raises:
          RunError: the file does not exist or is not a scorecard.
        """
        try:
            return Scorecard.of(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise RunError(f"there is no scorecard {path}; give the directory of a run that has finished") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} is not a scorecard ({error}); score the model again") from error


def not_measured(unit: str, note: str) -> Figure:
    """A figure that is missing.

    Args:
      unit: the unit that it would have.
      note: why it is missing, or the command that would measure it.
    """
    return Figure(None, unit, "unavailable", note)


def table(scorecards: Sequence[Scorecard], figures: Sequence[str] = HEADLINE) -> Table:
    """Makes a table for the terminal; it is readable with 80 columns for one model, and with 100 for several.

    Args:
      scorecards: a single scorecard gives one row per figure; several give one row per model.
      figures: the columns of the table of several models. If all models share a method, it is in the heading.
    """
    return _one(scorecards[0]) if len(scorecards) == 1 else _several(scorecards, figures)


def show(figure: Figure) -> str:
    """A figure as text: ``12.3 ms``, ``295 kFLOP/token``, ``813k parameters``, ``1.4120 bits/byte``, ``0.8%``; or
    ``not measured``.
    """
    symbol, rest = _split_unit(figure.unit)
    return amount(figure) + ("" if figure.value is None or figure.unit == "share" else rest if symbol else f" {rest}")


def amount(figure: Figure) -> str:
    """A figure as text without the part of its unit that models share: ``12.3 ms``, ``295 kFLOP``, ``813k``."""
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
    """Splits a unit into the symbol that takes an SI prefix, such as "FLOP" (or ""), and the rest."""
    symbol, slash, rest = unit.partition("/")
    return (symbol, slash + rest) if symbol in ("B", "s", "FLOP", "J") else ("", unit)


def _scaled(value: float) -> tuple[str, str]:
    """A value as three significant digits and an SI prefix from nano to exa."""
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
