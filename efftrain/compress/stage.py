"""One stage of a compression: a run directory in, the run directory of the converted model out."""

from pathlib import Path
from typing import Any

from efftrain.compress.commands.compression import Compression
from efftrain.compress.corpus_rows import CorpusRows
from efftrain.compress.origin import CUT, FILE_NAME, check_made_from, origin
from efftrain.config import to_json
from efftrain.measure.measurements import Measurements
from efftrain.models.decoder import Decoder
from efftrain.progress import console
from efftrain.train.run.directory import newest_step, read_json
from efftrain.train.run.model_run import KEPT_FILES, write_model_run
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
        settings |= {"training": {"length": text.length} | settings.get("training", {}) | {"checkpoints": None}}
        _write(out, run, model, settings, made_from | changes)
        kept.remove()
    return model


def _write(out: Path, run: Path, model: Decoder, settings: dict[str, Any], made_from: dict[str, Any]) -> None:
    _, params, rest = split_model(model)
    write_model_run(
        out,
        {"params": params, "model_state": rest},
        step=made_from["step"],
        made_from=(FILE_NAME, made_from),
        config=settings | {"model": to_json(model.config)},
        copies=[run / name for name in KEPT_FILES],
    )
