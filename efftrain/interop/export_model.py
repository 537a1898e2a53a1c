"""Writes a run's model as a folder that transformers, vLLM and llama.cpp's converter read."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from efftrain.errors import ConfigError
from efftrain.interop.architecture import FileTensor, layout
from efftrain.interop.card_facts import card_facts
from efftrain.interop.import_model import FILE_NAME as IMPORT
from efftrain.interop.model_card import TRANSFORMERS, WITHOUT_TOKENIZER, write_card
from efftrain.interop.new_folder import new_folder
from efftrain.interop.plan import PREFERENCE, ExportPlan, Refusal, classify
from efftrain.interop.run_arrays import Variable, float_variables, stored_variables
from efftrain.interop.run_facts import ZeroCount, early_exits, exits_note
from efftrain.interop.safetensors_writer import DTYPES, SafetensorsWriter
from efftrain.models.config import ModelConfig
from efftrain.progress import Progress
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.streamed_arrays import Index
from efftrain.train.run.directory import checkpoint_directory, load_model_config, read_json

TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def export_model(run: Path, out: Path, *, dtype: str = "float32", compressed: bool = False) -> ExportPlan:
    """Exports the model of a run, variable by variable, with its model card.

    Args:
      run: the run directory.
      out: the folder, which must not exist; it appears when it is complete.
      dtype: of the exported weights: float32, bfloat16 or float16.
      compressed: keep the quantised matrices of a converted run quantised, as ``compressed-tensors``; what is float
        stays float32.

    Raises:
      ConfigError: no other project's architecture computes this model; the message says which field is the reason and
        what can be done.
      RunError: the run cannot be read, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    config = load_model_config(run)
    if compressed and not config.quantization.stored:
        raise ConfigError(
            f"the matrices of {run} are float; quantise them with efftrain compress quantize, and export the run that "
            "it makes, or give --format float32"
        )
    plan = planned(run, config, compressed=compressed)
    facts = card_facts(run)
    with new_folder(out) as folder:
        texts = run_texts(run)
        settings = plan.settings | {
            "architectures": [plan.architecture.name],
            "model_type": plan.architecture.model_type,
            "dtype": dtype,
            "torch_dtype": dtype,
        }
        generation = json.loads(texts.get("generation_config.json", "{}"))
        settings |= {name: value for name, value in generation.items() if name.endswith("_token_id")}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        plan = replace(plan, notes=plan.notes + _write_weights(run, config, plan, folder, dtype))
        loading = TRANSFORMERS if "tokenizer.json" in texts else WITHOUT_TOKENIZER
        if compressed:
            loading = replace(loading, imported=False)
        form = f"{plan.architecture.name}, {'compressed-tensors' if compressed else dtype}"
        write_card(folder, facts, loading=loading, form=form, notes=plan.notes)
    return plan


def run_texts(run: Path) -> dict[str, str]:
    """Returns the files of a run that every export holds too, with their content: tokenizer, template, settings."""
    return {name: (run / name).read_text("utf-8") for name in TEXTS if (run / name).is_file()}


def planned(run: Path, config: ModelConfig, *, compressed: bool = False) -> ExportPlan:
    """Decides as what a run's model is exported; an imported one as what it came from, if it still fits.

    Args:
      run: the run directory.
      config: the configuration of its model.
      compressed: see ``classify``.

    Raises:
      ConfigError: it cannot be exported.
    """
    made_from = run / IMPORT
    before = [read_json(made_from)["architecture"]] if made_from.is_file() else []
    plan = classify(config, preference=(*before, *PREFERENCE), compressed=compressed)
    if isinstance(plan, Refusal):
        raise ConfigError(f"{run} cannot be exported: {plan.reason}; {' or '.join(plan.alternatives)}")
    exits = early_exits(run, config)
    if exits is None:
        return plan
    settings = plan.settings | {"efftrain": {"early_exit": exits}}
    return replace(plan, settings=settings, notes=(*plan.notes, exits_note(exits)))


def _write_weights(run: Path, config: ModelConfig, plan: ExportPlan, folder: Path, dtype: str) -> tuple[str, ...]:
    """Writes the files and returns the notes on what they hold."""
    zeros = ZeroCount()
    tensors = encoded = file_tensors(run, config, plan, zeros)
    if plan.quantized is not None:
        entries = plan.quantized.entries()
        encoded = (pair for name, array in tensors for pair in plan.quantized.encode(name, array))
    else:
        code, kind = DTYPES[dtype]
        entries = {t.name: (code, np.dtype(kind), t.shape) for t in layout(plan.architecture, plan.config)}
    writer = SafetensorsWriter(folder, entries)
    for name, array in encoded:
        writer.write(name, array)
        del array  # before the next one is read
    writer.close()
    return zeros.notes


def file_tensors(
    run: Path, config: ModelConfig, plan: ExportPlan, zeros: ZeroCount
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of the files by name, as soon as the variables that they are made of have been read.

    Args:
      run: the run directory.
      config: the configuration of its model.
      plan: of the export; if it has quantised files, their tensors are yielded.
      zeros: counts those of a float model; in a quantised one, rounding makes zeros too.

    Raises:
      ConfigError: the model has values for which the architecture has no place.
      RunError: the run's checkpoint cannot be read.
    """
    with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
        if plan.quantized is not None:
            yield from _assembled(plan.quantized.tensors, stored_variables(checkpoints, config), plan)
            return
        variables = float_variables(checkpoints, config)
        if not config.quantization.rules:
            variables = zeros.counted(variables)
        yield from _assembled(layout(plan.architecture, plan.config), variables, plan)


def _assembled(
    tensors: Sequence[FileTensor], variables: Mapping[str, Variable], plan: ExportPlan
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors by name; where their pieces are larger than the variables, they have zeros."""
    places: dict[str, dict[tuple[int, ...], tuple[FileTensor, int]]] = {}
    numbers: dict[str, int] = {}  # of a tensor that the variables have
    for tensor in tensors:
        for number, piece in enumerate(tensor.pieces):
            places.setdefault(piece.variable, {})[piece.index] = (tensor, number)
            size = math.prod(variables[piece.variable].shape[len(piece.index) :])
            numbers[tensor.name] = numbers.get(tensor.name, 0) + size
    groups = _read_together(tensors)
    groups += [[name] for name in variables if name not in places]
    groups.sort(key=lambda group: (-max(variables[name].size for name in group), group))
    unfinished: dict[str, tuple[np.ndarray, int]] = {}  # the tensor as far as it was read, and numbers that it lacks
    with Progress("export", len(variables), unit="arrays") as progress:
        for group in groups:
            for variable, index, block in _in_step({name: variables[name] for name in group}):
                if variable not in places:
                    _check_unused(variable, block, plan)
                    continue
                n_leading = len(next(iter(places[variable])))
                for place in itertools.product(*(range(part.start, part.stop) for part in index[:n_leading])):
                    tensor, number = places[variable][place]
                    if tensor.name not in unfinished:
                        shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
                        unfinished[tensor.name] = np.zeros(shape, block.dtype), numbers[tensor.name]
                    array, lacks = unfinished[tensor.name]
                    here = tuple(i - part.start for i, part in zip(place, index[:n_leading], strict=True))
                    start = sum(piece.shape[-1] for piece in tensor.pieces[:number])
                    columns = slice(start, start + block.shape[-1])
                    array[(*index[n_leading:-1], columns)] = block[here]
                    unfinished[tensor.name] = array, lacks - block[here].size
                    if lacks == block[here].size:
                        del unfinished[tensor.name]
                        yield tensor.name, array.T if tensor.transposed else array
                    del array
            progress.advance(len(group))


def _read_together(tensors: Sequence[FileTensor]) -> list[list[str]]:
    """Groups the variables of which the files have parts in the same tensors."""
    groups: dict[str, list[str]] = {}
    for tensor in tensors:
        names = [piece.variable for piece in tensor.pieces]
        together = sorted(set(names).union(*(groups.get(name, ()) for name in names)))
        groups |= dict.fromkeys(together, together)
    return [list(group) for group in dict.fromkeys(map(tuple, groups.values()))]


def _in_step(variables: Mapping[str, Variable]) -> Iterator[tuple[str, Index, np.ndarray]]:
    """Yields (variable, index, block) of several variables, none of which is more than a block ahead of another."""
    done = dict.fromkeys(variables, 0.0)
    while done:
        name = min(done, key=lambda name: done[name])
        found = next(variables[name].blocks, None)
        if found is None:
            del done[name]
            continue
        done[name] += found[1].size / variables[name].size
        yield name, *found


def _check_unused(variable: str, array: np.ndarray, plan: ExportPlan) -> None:
    if np.any(array) and variable.endswith("/bias"):
        raise ConfigError(
            f"{variable} balances the experts and is not zero, and {plan.architecture.name} has no place for it; train "
            "with moe.bias_rate 0 and moe.auxiliary_loss to export the model"
        )
