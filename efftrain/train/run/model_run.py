"""Writes the run directory of a finished model: of a conversion, or of a model that was imported."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from efftrain.config import finite_json
from efftrain.errors import RunError
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.streamed_arrays import StreamedArray
from efftrain.train.run.environment import environment
from efftrain.train.run.tokenizers import TOKENIZER_FILES

# Files of a run that a run made from it needs too: its classes, its tokenizer, its chat template, its end of text.
KEPT_FILES = ("recipe.py", *TOKENIZER_FILES)


def write_model_run(
    out: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    made_from: tuple[str, Mapping[str, Any]],
    config: Mapping[str, Any],
    copies: Iterable[Path] = (),
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a run directory with a model and no optimizer, under the name ``OUT.incomplete`` until it is complete.

    Args:
      out: the directory, which must not exist.
      state: ``params`` and ``model_state``, as ``state.split_model`` returns them, or of ``StreamedArray``s only.
      step: number of training steps that the model has seen.
      made_from: name and content of the JSON file that says what the model was made from. It is written first, so that
        what a killed process left is known to be the command's own, and is replaced.
      config: content of ``config.json``.
      copies: files that are copied into the directory, as far as they exist.
      texts: files with their content.

    Raises:
      RunError: the directory cannot be written.
    """
    unfinished = out.with_name(f"{out.name}.incomplete")
    marker, content = made_from
    try:
        if unfinished.is_dir() and _is_ours(unfinished, marker):
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        for name, value in {marker: content, "config.json": config, "environment.json": environment()}.items():
            (unfinished / name).write_text(json.dumps(finite_json(value), indent=1, allow_nan=False) + "\n")
        for path in copies:
            if path.exists():
                shutil.copyfile(path, unfinished / path.name)
        for name, text in (texts or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        streamed = any(isinstance(array, StreamedArray) for array in jax.tree.leaves(dict(state)))
        with Checkpoints(unfinished / "checkpoints", streamed=streamed) as checkpoints:
            checkpoints.save(step, dict(state), None, None, squeezed=not streamed)
            checkpoints.wait()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free disk space or choose another --out") from error


def _is_ours(unfinished: Path, marker: str) -> bool:
    """Whether a killed process of this command left the directory: its own file is the first that it writes."""
    return (unfinished / marker).exists() or all(p.name.startswith(marker) for p in unfinished.iterdir())
