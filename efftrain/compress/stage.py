"""One stage of a compression: a run directory in, the run directory of the converted model out."""

import os
import shutil
from pathlib import Path
from typing import Any

from efftrain.compress.commands.compression import Compression
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.origin import CUT, FILE_NAME, check_made_from, origin
from efftrain.config import to_json
from efftrain.errors import RunError
from efftrain.measure.measurements import Measurements, write_json
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.run.directory import newest_step, read_json
from efftrain.train.run.environment import environment
from efftrain.train.state import split_model


def make_stage(
    run: Path, options: Compression, text: CorpusRows, out: Path, evaluated_rows: int | None = None
) -> Decoder | None:
    """Writes the run directory of a converted model and returns the model; None if the directory exists already."""
    settings = read_json(run / "config.json")
    made_from = origin(run, options, text, rooms=CUT)
    made_from |= {"step": newest_step(run, settings), "evaluated_rows": evaluated_rows}
    with Measurements(out, made_from, made_from["code"]) as kept:
        if out.exists():
            check_made_from(out, made_from)
            kept.remove()
            console.print(f"{out} is converted already", markup=False)
            return None
        model, changes = options.apply(run, text, kept)
        _write(out, run, model, settings, made_from | changes)
        kept.remove()
    return model


def _write(out: Path, run: Path, model: Decoder, settings: dict[str, Any], made_from: dict[str, Any]) -> None:
    """Writes the new run directory, under another name until it is complete."""
    unfinished = out.with_name(f"{out.name}.incomplete")
    try:
        if unfinished.is_dir() and _is_ours(unfinished):
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        write_json(unfinished / FILE_NAME, made_from)
        training = settings.get("training", {}) | {"checkpoints": None}
        write_json(unfinished / "config.json", settings | {"model": to_json(model.config), "training": training})
        write_json(unfinished / "environment.json", environment())
        for name in ("recipe.py", "tokenizer.json"):
            if (run / name).exists():
                shutil.copyfile(run / name, unfinished / name)
        _, params, rest = split_model(model)
        with Checkpoints(unfinished / "checkpoints") as checkpoints:
            checkpoints.save(made_from["step"], {"params": params, "model_state": rest}, None, None, squeezed=True)
            checkpoints.wait()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free disk space or choose another --out") from error


def _is_ours(unfinished: Path) -> bool:
    """Whether a killed process of this command left the directory: its own file is the first that it writes."""
    return (unfinished / FILE_NAME).exists() or all(p.name.startswith(FILE_NAME) for p in unfinished.iterdir())
