"""Turns the files of another project's model into a run directory."""

import hashlib
import itertools
from collections.abc import Callable
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
from efftrain.interop.hub import local_folder
from efftrain.interop.hugging_face import HuggingFaceFolder
from efftrain.interop.source import ModelSource
from efftrain.models.config import Attention, ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.positions import Rotary
from efftrain.models.rope_scaling import LongRope
from efftrain.progress import Progress
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.checkpoints.streamed_arrays import Index, StreamedArray
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model

FILE_NAME = "import.json"
HEAD, EMBEDDING = "lm_head.weight", "embedding/table"


def import_model(path: Path, out: Path, *, length: int | None = None, max_length: int | None = None) -> ModelConfig:
    """Imports a model into a new run directory, tensor by tensor.

    Args:
      path: a folder in the format of Hugging Face, a GGUF file, or the name of a model on the Hugging Face Hub.
      out: the run directory, which must not exist.
      length: number of tokens of the rows that commands read, such as those that calibrate a compression. None: not
        known, and such commands ask for it.
      max_length: see ``read_config``.

    Returns:
      The configuration of the model.

    Raises:
      ConfigError: the model's configuration cannot be expressed in efftrain; the message names the field.
      RunError: files are missing, damaged or do not fit the configuration, or ``out`` exists or cannot be written.
    """
    if out.exists():
        raise RunError(f"{out} exists already; choose another --out")
    local = local_folder(path)
    source = open_source(local)
    config = read_config(source, max_length)
    if length is not None and not 1 < length <= config.max_length:
        raise ConfigError(f"--length is {length}; use 2 to {config.max_length}, the longest row of this model")
    architecture = architecture_of(source.settings).model_type
    named = {"source": path.name} if local == path else {"source": path.as_posix(), "revision": local.name}
    made_from = named | {"architecture": architecture, "digest": _digest(source)}
    _, params, rest = split_model(abstract_decoder(config))
    with Progress("import", unit="blocks") as progress:
        arrays = streamed_arrays(source, config, progress.advance)  # reads and checks everything once
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
    raise ConfigError(
        f"{path} is neither a folder nor a GGUF file; give the folder of a model, a .gguf file, or a name of the "
        "Hugging Face Hub"
    )


def read_config(source: ModelSource, max_length: int | None = None) -> ModelConfig:
    """Reads the configuration of a model.

    Args:
      source: the files.
      max_length: length in tokens of the longest text that the model is used for, at most what its files say. It is
        the way to import models whose rotary frequencies depend on the length of a text: up to the original length,
        ``DynamicScaling`` has no effect and ``LongRope`` takes its short factors. None: what the files say.

    Raises:
      ConfigError: a field does not fit; the message has its name.
    """
    architecture = architecture_of(source.settings)
    try:
        config = architecture.to_config(source.settings)
    except ConfigError as error:
        origin = source.settings.origin
        raise error if origin in str(error) else ConfigError(f"{origin}: {error}") from error
    source.settings.check_all_read()
    if max_length is None:
        return config
    if not 1 < max_length <= config.max_length:
        raise ConfigError(f"--max-length is {max_length}; use 2 to {config.max_length}, for which this model was made")
    if config.learned_positions and max_length != config.max_length:
        raise ConfigError(
            f"--max-length is {max_length}, and this model has a learned vector for each of its {config.max_length} "
            "positions; import it without --max-length"
        )
    return config.replace(max_length=max_length)


def notes(config: ModelConfig) -> list[str]:
    """Returns what differs between an imported model and the original, as sentences."""
    lengths = set()
    for block in config.layers:
        position = block.attention.position if isinstance(block.attention, Attention) else None
        scaling = position.scaling if isinstance(position, Rotary) else None
        if isinstance(scaling, LongRope) and scaling.short_factor != scaling.long_factor:
            lengths.add(scaling.original_length)
    return [
        "LongRope takes its long factors for texts of every length, and transformers its short ones for texts of up to "
        f"{length} tokens, as does an import with --max-length {length}."
        for length in sorted(lengths)
        if length < config.max_length
    ]


def streamed_arrays(
    source: ModelSource, config: ModelConfig, advance: Callable[[], None] = lambda: None
) -> dict[str, StreamedArray]:
    """Returns every variable of the model as float32, by its name in a checkpoint, after reading and checking it once.

    One tensor of the source and one block of a variable are held at a time.

    Args:
      source: the files.
      config: configuration of the model.
      advance: called after every block that was read, here and later.

    Raises:
      RunError: a tensor is missing, has another shape, has no place in the model, or has numbers that are not finite.
    """
    architecture = architecture_of(source.settings)
    tensors = layout(architecture, config)
    names = _names_in(source, tensors, architecture.no_parameters)
    if config.tied_embedding and HEAD in source.shapes:
        _check_tied(source, next(t for t in tensors if t.pieces[0].variable == EMBEDDING), names)
    held = _HeldTensor(source, names)
    holders: dict[str, dict[tuple[int, ...], tuple[FileTensor, int]]] = {}
    for tensor in tensors:
        for number, piece in enumerate(tensor.pieces):
            holders.setdefault(piece.variable, {})[piece.index] = (tensor, number)
    abstract, found = _abstract(config), {}
    for variable, places in holders.items():
        shape = abstract[variable].shape

        def read(index: Index, places: Any = places, shape: Any = shape) -> np.ndarray:
            advance()
            return _block(held, places, shape, index)

        found[variable] = StreamedArray.read_once(shape, np.dtype(np.float32), read)
    for variable, array in not_in_files(config).items():

        def zeros(index: Index, array: Any = array) -> np.ndarray:
            return np.zeros([part.stop - part.start for part in index], array.dtype)

        found[variable] = StreamedArray.read_once(array.shape, np.dtype(array.dtype), zeros)
    return found


class _HeldTensor:
    """The tensor of a source that was read last."""

    def __init__(self, source: ModelSource, names: dict[str, str]):
        self.path, self._source, self._names = source.path, source, names
        self._name, self._array = "", np.empty(0)

    def read(self, name: str) -> np.ndarray:
        if name != self._name:
            self._name, self._array = "", np.empty(0)  # frees the one before
            self._array, self._name = self._source.read(self._names[name]), name
        return self._array


def _block(
    held: _HeldTensor,
    places: dict[tuple[int, ...], tuple[FileTensor, int]],
    shape: tuple[int, ...],
    index: Index,
) -> np.ndarray:
    """The block of a variable at ``index``, from the tensors that hold its parts."""
    n_leading = len(next(iter(places)))
    block = np.empty([part.stop - part.start for part in index], np.float32)
    leading = [range(part.start, part.stop) for part in index[:n_leading]]
    for place in itertools.product(*leading):
        tensor, number = places[place]
        part = _piece(held.read(tensor.name), tensor, number)
        here = tuple(i - slice_.start for i, slice_ in zip(place, index[:n_leading], strict=True))
        block[here] = part[index[n_leading:]]
        if not np.isfinite(block[here]).all():
            raise RunError(f"{held.path}: {tensor.name} has numbers that are not finite; download it again")
    return block


def _check_tied(source: ModelSource, embedding: FileTensor, names: dict[str, str]) -> None:
    if not np.array_equal(source.read(HEAD), source.read(names[embedding.name])):
        raise RunError(f"{source.path}: tie_word_embeddings is true, but {HEAD} is not the embedding")


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


def _filled(state: Any, arrays: dict[str, StreamedArray]) -> Any:
    return unflatten({name: arrays.pop(name) for name in flatten(state)}, state)


def _digest(source: ModelSource) -> str:
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    state = hashlib.sha256()
    for file in files:
        state.update(file_digest(file).encode())
    return state.hexdigest()
