"""Writes a run's model as a folder that transformers, vLLM and llama.cpp's converter read."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from efftrain.errors import ConfigError, RunError
from efftrain.interop.architecture import FileTensor, layout
from efftrain.interop.import_model import FILE_NAME as IMPORT
from efftrain.interop.plan import PREFERENCE, ExportPlan, Refusal, classify
from efftrain.interop.safetensors_writer import DTYPES, SafetensorsWriter
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.progress import Progress
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.run.directory import checkpoint_directory, load_model_config, read_json

TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MARKER = ".efftrain-export"


def export_model(run: Path, out: Path, *, dtype: str = "float32") -> ExportPlan:
    """Exports the model of a run, variable by variable.

    Args:
      run: the run directory.
      out: the folder, which must not exist; it appears when it is complete.
      dtype: of the exported weights: float32, bfloat16 or float16.

    Raises:
      ConfigError: no other project's architecture computes this model; the message says which field is the reason and
        what can be done.
      RunError: the run cannot be read, or the folder cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists already; choose another --to")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    config = load_model_config(run)
    plan = planned(run, config)
    unfinished = out.with_name(f"{out.name}.incomplete")
    try:
        if (unfinished / MARKER).exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        (unfinished / MARKER).touch()
        texts = {name: (run / name).read_text("utf-8") for name in TEXTS if (run / name).is_file()}
        settings = plan.settings | {
            "architectures": [plan.architecture.name],
            "model_type": plan.architecture.model_type,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        generation = json.loads(texts.get("generation_config.json", "{}"))
        settings |= {name: value for name, value in generation.items() if name.endswith("_token_id")}
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        for name, text in texts.items():
            (unfinished / name).write_text(text, encoding="utf-8")
        _write_weights(run, config, plan, unfinished, dtype)
        (unfinished / MARKER).unlink()
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"cannot write {out} ({error}); free disk space or choose another --to") from error
    return plan


def planned(run: Path, config: ModelConfig) -> ExportPlan:
    """Decides as what a run's model is exported; an imported one as what it came from, if it still fits.

    Raises:
      ConfigError: it cannot be exported.
    """
    made_from = run / IMPORT
    before = [read_json(made_from)["architecture"]] if made_from.is_file() else []
    plan = classify(config, preference=(*before, *PREFERENCE))
    if isinstance(plan, Refusal):
        raise ConfigError(f"{run} cannot be exported: {plan.reason}; {' or '.join(plan.alternatives)}")
    return plan


def _write_weights(run: Path, config: ModelConfig, plan: ExportPlan, folder: Path, dtype: str) -> None:
    code, kind = DTYPES[dtype]
    tensors = layout(plan.architecture, config)
    writer = SafetensorsWriter(folder, {t.name: (code, np.dtype(kind), t.shape) for t in tensors})
    for name, array in file_tensors(run, config, plan):
        writer.write(name, array)
    writer.close()


def file_tensors(run: Path, config: ModelConfig, plan: ExportPlan) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the files by name, as soon as the variables that they are made of have been read.

    Raises:
      ConfigError: the model has values for which the architecture has no place.
      RunError: the run's checkpoint cannot be read.
    """
    holders: dict[str, list[tuple[FileTensor, int]]] = {}
    for tensor in layout(plan.architecture, config):
        for number, piece in enumerate(tensor.pieces):
            holders.setdefault(piece.variable, []).append((tensor, number))
    waiting: dict[str, dict[int, np.ndarray]] = {}
    with Progress("export", len(holders), unit="arrays") as progress:
        for variable, array in _arrays(run, config):
            if variable not in holders:
                _check_unused(variable, array, plan)
                continue
            for tensor, number in holders[variable]:
                parts = waiting.setdefault(tensor.name, {})
                parts[number] = array[tensor.pieces[number].index]
                if len(parts) == len(tensor.pieces):
                    whole = np.concatenate([parts[i] for i in sorted(parts)], axis=-1) if len(parts) > 1 else parts[0]
                    del waiting[tensor.name]
                    yield tensor.name, whole.T if tensor.transposed else whole
            progress.advance()


def _check_unused(variable: str, array: np.ndarray, plan: ExportPlan) -> None:
    if np.any(array) and variable.endswith("/bias"):
        raise ConfigError(
            f"{variable} balances the experts and is not zero, and {plan.architecture.name} has no place for it; train "
            "with moe.bias_rate 0 and moe.auxiliary_loss to export the model"
        )


def _arrays(run: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract: Any = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.state(abstract_decoder(config))
    )
    with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
        for name, array in checkpoints.model_arrays(abstract):
            yield name, np.asarray(array)
