"""Turns the files of another project's model into a run directory."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - numpy learns bfloat16
import numpy as np
from flax import nnx

from efftrain.config import to_json
from efftrain.data.storage.shards import file_digest
from efftrain.errors import ConfigError, RunError
from efftrain.interop.architecture import FileTensor, layout, not_in_files
from efftrain.interop.architectures import architecture_of
from efftrain.interop.hugging_face import HuggingFaceFolder
from efftrain.interop.source import ModelSource
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.progress import Progress
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

FILE_NAME = "import.json"
HEAD, EMBEDDING = "lm_head.weight", "embedding/table"


def import_model(path: Path, out: Path, *, length: int | None = None) -> ModelConfig:
    """Imports a model into a new run directory, tensor by tensor.

    Args:
      path: a folder in the format of Hugging Face, or a GGUF file.
      out: the run directory, which must not exist.
      length: number of tokens of the rows that commands read, such as those that calibrate a compression. None: not
        known, and such commands ask for it.

    Returns:
      The configuration of the model.

    Raises:
      ConfigError: the model's configuration cannot be expressed in efftrain; the message names the field.
      RunError: files are missing, damaged or do not fit the configuration, or ``out`` exists or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out")
    source = open_source(path)
    config = read_config(source)
    if length is not None and not 1 < length <= config.max_length:
        raise ConfigError(f"--length is {length}; use 2 to {config.max_length}, the longest row of this model")
    arrays = dict(read_arrays(source, config))
    _, params, rest = split_model(abstract_decoder(config))
    architecture = architecture_of(source.settings).model_type
    made_from = {"source": path.name, "architecture": architecture, "digest": _digest(source)}
    write_model_run(
        out,
        {"params": _filled(params, arrays), "model_state": _filled(rest, arrays)},
        step=0,
        made_from=(FILE_NAME, dict(source.origin) | made_from),
        config={"model": to_json(config)} | ({} if length is None else {"training": {"length": length}}),
        texts=source.texts,
    )
    return config


def open_source(path: Path) -> ModelSource:
    """Opens a folder or a GGUF file; see ``import_model``."""
    if path.is_dir():
        return HuggingFaceFolder(path)
    if path.suffix == ".gguf" and path.is_file():
        from efftrain.interop.gguf_model import GgufModel

        return GgufModel(path)
    raise ConfigError(f"{path} is neither a folder nor a GGUF file; give the folder of a model, or a .gguf file")


def read_config(source: ModelSource) -> ModelConfig:
    """Reads the configuration of a model; raises ``ConfigError`` with the name of a field that does not fit."""
    architecture = architecture_of(source.settings)
    try:
        config = architecture.to_config(source.settings)
    except ConfigError as error:
        origin = source.settings.origin
        raise error if origin in str(error) else ConfigError(f"{origin}: {error}") from error
    source.settings.check_all_read()
    return config


def read_arrays(source: ModelSource, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every variable of the model as float32, by its name in a checkpoint; reads one tensor at a time.

    Raises:
      RunError: a tensor is missing, has another shape, or has no place in the model.
    """
    architecture = architecture_of(source.settings)
    tensors = layout(architecture, config)
    names = _names_in(source, tensors, architecture.no_parameters)
    holders: dict[str, list[tuple[FileTensor, int]]] = {}
    for tensor in tensors:
        for number, piece in enumerate(tensor.pieces):
            holders.setdefault(piece.variable, []).append((tensor, number))
    shapes = {name: array.shape for name, array in _abstract(config).items()}
    with Progress("import", len(shapes), unit="arrays") as progress:
        for variable, parts in holders.items():
            array = np.empty(shapes[variable], np.float32)
            for tensor, number in parts:
                array[tensor.pieces[number].index] = _piece(source.read(names[tensor.name]), tensor, number)
            if not np.isfinite(array).all():
                raise RunError(f"{source.path}: {parts[0][0].name} has numbers that are not finite; download it again")
            tied = variable == EMBEDDING and config.tied_embedding and HEAD in source.shapes
            if tied and not np.array_equal(source.read(HEAD).astype(np.float32), array):
                raise RunError(f"{source.path}: tie_word_embeddings is true, but {HEAD} is not the embedding")
            yield variable, array
            progress.advance()
        for variable, abstract in not_in_files(config).items():
            yield variable, np.zeros(abstract.shape, abstract.dtype)
            progress.advance()


def _piece(data: np.ndarray, tensor: FileTensor, number: int) -> np.ndarray:
    start = sum(piece.shape[-1] for piece in tensor.pieces[:number])
    stop = start + tensor.pieces[number].shape[-1]
    return data[start:stop].T if tensor.transposed else data[..., start:stop]


def _names_in(source: ModelSource, tensors: list[FileTensor], no_parameters: tuple[str, ...]) -> dict[str, str]:
    """Names in the architecture -> names in the files, which may lack the prefix of a model with a head."""
    wanted, found = {tensor.name: tensor.shape for tensor in tensors}, dict(source.shapes)
    prefix = next(name for name in wanted if "." in name).split(".")[0] + "."
    short = not any(name.startswith(prefix) for name in found)
    names = {name: name.removeprefix(prefix) if short else name for name in wanted}
    for name, shape in wanted.items():
        if names[name] not in found:
            raise RunError(f"{source.path} has no tensor {names[name]}, which its configuration asks for")
        if found[names[name]] != shape:
            raise RunError(
                f"{source.path}: {names[name]} has the shape {found[names[name]]}, and its configuration asks "
                f"for {shape}"
            )
    more = set(found) - set(names.values()) - {HEAD}
    more = {name for name in more if not name.endswith(no_parameters)}
    if HEAD not in wanted and HEAD in found and not _is_tied(tensors):
        more.add(HEAD)
    if more:
        raise RunError(
            f"{source.path} holds {min(more)}{f' and {len(more) - 1} more tensors' if len(more) > 1 else ''}, which "
            "its configuration does not mention; give the config.json that belongs to these weights"
        )
    return names


def _is_tied(tensors: list[FileTensor]) -> bool:
    return not any(piece.variable.startswith("head/kernel") for tensor in tensors for piece in tensor.pieces)


def _abstract(config: ModelConfig) -> dict[str, Any]:
    return flatten(nnx.state(abstract_decoder(config)))


def _filled(state: Any, arrays: dict[str, np.ndarray]) -> Any:
    return unflatten({name: arrays.pop(name) for name in flatten(state)}, state)


def _digest(source: ModelSource) -> str:
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    state = hashlib.sha256()
    for file in files:
        state.update(file_digest(file).encode())
    return state.hexdigest()
