"""Writes a run's model as a folder that transformers, vLLM and llama.cpp's converter read."""

import itertools
import json
import math
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
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.checkpoints.streamed_arrays import Index
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
        del array  # before the next one is read
    writer.close()


def file_tensors(run: Path, config: ModelConfig, plan: ExportPlan) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the files by name, as soon as the variables that they are made of have been read.

    Raises:
      ConfigError: the model has values for which the architecture has no place.
      RunError: the run's checkpoint cannot be read.
    """
    tensors = layout(plan.architecture, config)
    places: dict[str, dict[tuple[int, ...], tuple[FileTensor, int]]] = {}
    for tensor in tensors:
        for number, piece in enumerate(tensor.pieces):
            places.setdefault(piece.variable, {})[piece.index] = (tensor, number)
    variables = flatten(nnx.state(abstract_decoder(config)))
    groups = _read_together(tensors)
    groups += [[name] for name in variables if name not in places]
    groups.sort(key=lambda group: (-max(variables[name].size for name in group), group))
    unfinished: dict[str, tuple[np.ndarray, int]] = {}  # the tensor as far as it was read, and numbers that it lacks
    with (
        Progress("export", len(variables), unit="arrays") as progress,
        Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints,
    ):
        sources = checkpoints.model_blocks(_on_this_device(config))
        for group in groups:
            for variable, index, block in _in_step({name: sources[name] for name in group}, variables):
                if variable not in places:
                    _check_unused(variable, block, plan)
                    continue
                n_leading = len(next(iter(places[variable])))
                for place in itertools.product(*(range(part.start, part.stop) for part in index[:n_leading])):
                    tensor, number = places[variable][place]
                    if tensor.name not in unfinished:
                        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
                        unfinished[tensor.name] = np.empty(shape, block.dtype), math.prod(shape)
                    array, lacks = unfinished[tensor.name]
                    here = tuple(i - part.start for i, part in zip(place, index[:n_leading], strict=True))
                    start = sum(piece.shape[-1] for piece in tensor.pieces[:number])
                    columns = slice(start, start + tensor.pieces[number].shape[-1])
                    array[(*index[n_leading:-1], columns)] = block[here]
                    unfinished[tensor.name] = array, lacks - block[here].size
                    if lacks == block[here].size:
                        del unfinished[tensor.name]
                        yield tensor.name, array.T if tensor.transposed else array
                    del array
            progress.advance(len(group))


def _read_together(tensors: list[FileTensor]) -> list[list[str]]:
    """Groups the variables of which the files have parts in the same tensors."""
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        names = [piece.variable for piece in tensor.pieces]
        together = sorted(set(names).union(*(groups.get(name, ()) for name in names)))
        groups |= dict.fromkeys(together, together)
    return [list(group) for group in dict.fromkeys(map(tuple, groups.values()))]


def _in_step(
    sources: dict[str, Iterator[tuple[Index, np.ndarray]]], variables: dict[str, Any]
) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Yields (variable, index, block) of several variables, none of which is more than a block ahead of another."""
    done = dict.fromkeys(sources, 0.0)
    while done:
        variable = min(done, key=lambda name: done[name])
        found = next(sources[variable], None)
        if found is None:
            del done[variable]
            continue
        done[variable] += found[1].size / variables[variable].size
        yield variable, *found


def _check_unused(variable: str, array: np.ndarray, plan: ExportPlan) -> None:
    if np.any(array) and variable.endswith("/bias"):
        raise ConfigError(
            f"{variable} balances the experts and is not zero, and {plan.architecture.name} has no place for it; train "
            "with moe.bias_rate 0 and moe.auxiliary_loss to export the model"
        )


def _on_this_device(config: ModelConfig) -> Any:
    here = SingleDeviceSharding(jax.local_devices()[0])
    abstract = nnx.state(abstract_decoder(config))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
