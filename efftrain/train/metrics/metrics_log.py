"""``metrics.jsonl`` and the TensorBoard events of a run: written row by row, and read even from a damaged file."""

import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from efftrain.config import finite_json
from efftrain.progress import console
from efftrain.train.run.writing import writing

FILE_NAME = "metrics.jsonl"
# A row ends at its end of line, or where the next one begins: a row that was cut off has no end of line.
_ROW_ENDS = re.compile(rb'\n|(?=\{"step": ?\d)')

Row = dict[str, Any]


class MetricsLog:
    """Writes ``metrics.jsonl`` and TensorBoard events: one row per step, in order, also after a restart.

    Of a damaged file, every row that can be read is kept; of two rows of the same step and split, the newer one. A
    warning says what was lost, and a copy of the damaged file is kept beside the new one.

    Args:
      directory: the run directory.
      after_step: step that was restored. Rows of later steps are removed, because they will be written again.
    """

    def __init__(self, directory: Path, *, after_step: int):
        self._path = directory / FILE_NAME
        with writing(directory):
            if self._path.exists():
                _mend(self._path, after_step)
            self._file = self._path.open("a", buffering=1)
            self._events = Events(directory / "tensorboard", after_step=after_step)

    def write(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        split: str = "train",
        arrays: Mapping[str, list] | None = None,
    ) -> None:
        """Writes a row; a figure that is not finite becomes null, which JSON can express. Arrays skip TensorBoard."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with writing(self._path):
            self._file.write(json.dumps({"step": step, "split": split, **finite, **finite_json(arrays or {})}) + "\n")
            self._events.write(step, {f"{split}/{name}": value for name, value in values.items()})

    def flush(self) -> None:
        """Makes the rows written so far survive the process."""
        with writing(self._path):
            self._events.flush()

    def close(self) -> None:
        with writing(self._path):
            self._file.close()
            self._events.close()


class Events:
    """A TensorBoard event file, written in this thread: ``SummaryWriter``'s own thread hangs when the disk is full."""

    def __init__(self, directory: Path, *, after_step: int):
        """Starts a file; TensorBoard then drops what earlier files say of steps after ``after_step``."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        directory.mkdir(exist_ok=True)
        self._proto: Any = event_pb2  # has classes that are made at run time
        self._writer = EventsWriter(str(directory / "events"))
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._writer.write_event(self._proto.Event(wall_time=time.time(), step=after_step + 1, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.summary import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._writer.write_event(self._proto.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(directory: Path | str, split: str = "train") -> list[Row]:
    """Reads the rows of ``metrics.jsonl`` of one split. Lines that cannot be read are skipped, with a warning."""
    path = Path(directory) / FILE_NAME
    rows, n_lost = _parse(path.read_bytes())
    if n_lost:
        console.print(f"warning: {path}: left out {_lines(n_lost)} that cannot be read", style="yellow", markup=False)
    return [row for row in rows if row["split"] == split]


def keep_lost_rows(directory: Path, *, after_step: int, expected: int) -> None:
    """Keeps a copy of the rows that are about to be removed, with a warning, if they are of too many steps.

    The checkpoints of these steps were moved, deleted or damaged, and training does not restore what was measured then.

    Args:
      directory: the run directory.
      after_step: step that was restored.
      expected: number of steps that a killed process may lose.
    """
    path = directory / FILE_NAME
    newest = max((row["step"] for row in _parse(path.read_bytes())[0]), default=0) if path.exists() else 0
    if newest - after_step <= expected:
        return
    with writing(directory):
        shutil.copyfile(path, copy := _free_name(path, "before"))
    console.print(
        f"warning: {directory} has rows up to step {newest} and goes on from step {after_step}, as there is no newer "
        f"checkpoint; if they were moved, end this process and put them back; the rows are kept in {copy}",
        style="yellow",
        markup=False,
    )


def _mend(path: Path, after_step: int) -> None:
    """Rewrites the file with the rows up to this step, each once and in order."""
    found, n_lost = _parse(path.read_bytes())
    past = [row for row in found if row["step"] <= after_step]
    newest = {(row["step"], row["split"]): row for row in past}
    rows = sorted(newest.values(), key=lambda row: row["step"])
    n_older = len(past) - len(rows)
    losses = [f"{_lines(n_lost)} cannot be read"] if n_lost else []
    losses += [f"{_lines(n_older)} replaced by a newer row of the same step"] if n_older else []
    copied = ""
    if losses:
        shutil.copyfile(path, copy := _free_name(path, "damaged"))
        copied = f"; all other rows stay, and the file as it was is {copy}"
    if missing := _missing(rows, after_step):
        several = f"{len(missing)} steps from {missing[0]} to {missing[-1]}"
        losses.append(f"no row is left of {several if len(missing) > 1 else f'step {missing[0]}'}")
    if losses:
        console.print(f"warning: {path} is damaged: {', '.join(losses)}{copied}", style="yellow", markup=False)
    temporary = path.with_suffix(".incomplete")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


def _missing(rows: list[Row], after_step: int) -> list[int]:
    """Steps without a row, from the first row on: before it, they are in another run or elsewhere."""
    steps = {row["step"] for row in rows if row["split"] == "train"}
    return [step for step in range(min(steps), after_step + 1) if step not in steps] if steps else []


def _parse(content: bytes) -> tuple[list[Row], int]:
    """Returns the rows in the order of the file, and the number of pieces that are not a row.

    A last piece without an end of line is not counted: a process was killed while writing it, or is writing it now.
    """
    rows, n_lost = [], 0
    *pieces, last = _ROW_ENDS.split(content)
    for piece in [*pieces, last]:
        if (row := _row(piece)) is not None:
            rows.append(row)
        elif piece.strip() and piece is not last:
            n_lost += 1
    return rows, n_lost


def _row(piece: bytes) -> Row | None:
    try:
        row = json.loads(piece.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("split"), str):
        return None
    return row


def _lines(count: int) -> str:
    return f"{count} line{'s' if count > 1 else ''}"


def _free_name(path: Path, word: str) -> Path:
    names = (path.with_name(f"{path.name}.{word}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())
