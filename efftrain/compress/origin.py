"""The record of what a compressed model was made from, and the check of existing output against it."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from efftrain.class_names import current_name
from efftrain.code_identity import code_identity
from efftrain.compress.commands.compression import Compression
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.old_options import OldCompression
from efftrain.config import from_json, to_json
from efftrain.errors import ConfigError, RunError
from efftrain.measure.measurements import other_origin, write_json
from efftrain.measure.scorecard.scorecard import FILE_NAME as SCORECARD
from efftrain.progress import console
from efftrain.train.inputs import content
from efftrain.train.run.directory import load_model_config, read_json

FILE_NAME = "compression.json"
# The packages whose code decides the result of a conversion, and of a conversion with training.
CUT = ("compress", "data", "experiment", "measure", "models", "ops")
CUT_AND_TRAINED = (*CUT, "sharding", "train")


def origin(run: Path, options: Compression, text: CorpusRows, *, rooms: tuple[str, ...]) -> dict[str, Any]:
    """What a result is made from, as JSON: run and corpus (paths and fingerprints), options and identity of the code.

    Args:
      run: directory of the run that is compressed.
      options: of the command.
      text: the corpus.
      rooms: the packages of efftrain whose code counts.
    """
    return {
        "run": str(run),
        "model": content(run),
        "corpus": str(text.corpus),
        "text": content(text.corpus),
        "length": text.length,
        "options": to_json(options),
        "code": code_identity(load_model_config(run), rooms=rooms),
    }


def made_otherwise(before: dict[str, Any], made_from: dict[str, Any]) -> str | None:
    """As ``other_origin``: how a record differs from ``made_from``; entries that only the record has are ignored."""
    if _of_old_command(before):
        return "the options of an earlier version of efftrain compress"
    same_length = {"length": made_from["length"]}  # earlier versions read all rows as long as those of the run
    before = same_length | before | {"options": _completed(before.get("options"))}
    return other_origin({name: before.get(name) for name in made_from}, made_from)


def check_made_from(out: Path, made_from: dict[str, Any]) -> None:
    """Raises RunError if the directory holds a model that was made from something else."""
    if not (out / FILE_NAME).exists():
        raise RunError(f"{out} exists and is not a converted model; choose another --out")
    if reason := made_otherwise(read_json(out / FILE_NAME), made_from):
        raise RunError(f"{out} was made with {reason}; choose another --out, or delete it")


def rounds_are_done(
    run: Path, options: Compression, text: CorpusRows, out: Path, stages: Path, evaluated_rows: int | None
) -> bool:
    """Whether all rounds of a command are finished, so that nothing is left to do.

    Writes into ``stages`` what the rounds are made from. Unfinished rounds of another version of the code are deleted.

    Raises:
      RunError: ``out`` or ``stages`` was not made by this command, or is the finished result of other code.
    """
    made_from = origin(run, options, text, rooms=CUT_AND_TRAINED) | {"evaluated_rows": evaluated_rows}
    if out.exists() and not (stages / "1-cut").exists():
        raise RunError(f"{out} exists and was not made by this command, or {stages} is gone; choose another --out")
    if not any((stages / name).exists() for name in ("1-cut", "1-search")):
        write_json(stages / FILE_NAME, made_from)
        return False
    if not (stages / FILE_NAME).exists():
        raise RunError(f"{stages} was made by an earlier version or by another command; choose another --out")
    before, finished = read_json(stages / FILE_NAME), (out / SCORECARD).exists()
    reason = made_otherwise(before, made_from)
    if _of_old_command(before):
        raise RunError(f"{stages} was made with {reason}; choose another --out, or delete it and {out}")
    if reason and made_otherwise(before | {"code": made_from["code"]}, made_from) is None:
        if finished:
            raise RunError(f"{out} was made with {reason}; choose another --out, or delete it and {stages}")
        console.print(
            f"{stages} is left from a command that was interrupted, with {reason}; starting again", markup=False
        )
        for folder in (out, stages):
            shutil.rmtree(folder, ignore_errors=True)
        write_json(stages / FILE_NAME, made_from)
    return finished and reason is None  # if something else differs, the stage that it concerns raises the error


def _of_old_command(record: dict[str, Any]) -> bool:
    options = record.get("options")
    return isinstance(options, dict) and current_name(str(options.get("type"))) == OldCompression.__name__


def _completed(options: Any) -> Any:
    """The options of a record, in which options that were added to the code later have their defaults."""
    with contextlib.suppress(ConfigError):
        return to_json(from_json(options))
    return options
