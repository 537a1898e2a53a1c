"""Writes GGUF files, which llama.cpp and programs built on it read."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.gguf_file import SPAN, require_gguf

if TYPE_CHECKING:
    from gguf import GGUFValueType, GGUFWriter

ExportType = Literal["F32", "F16", "Q8_0", "Q4_0", "Q4_1"]
_FLOAT32, _FLOAT16 = float(np.finfo(np.float32).max), 65504.0
_UINT32, _INT32 = range(2**32), range(-(2**31), 2**31)


@dataclass(frozen=True)
class ExportTensor:
    """A tensor to be written, whose values are read only when it is its turn.

    Attributes:
      name: the name in llama.cpp, such as ``blk.0.attn_q.weight``.
      shape: row-major, (out, in) for a matrix.
      type: how it is stored. The quantised types need rows that are a multiple of 32 values.
      read: returns the values, of this shape and any float dtype.
    """

    name: str
    shape: tuple[int, ...]
    type: ExportType
    read: Callable[[], np.ndarray]


def write_gguf(
    path: Path | str,
    architecture: str,
    metadata: Mapping[str, Any],
    tokenizer: Mapping[str, Any],
    tensors: Iterable[ExportTensor],
) -> None:
    """Writes a model as a GGUF file, one tensor after another, under another name until it is complete.

    Values that were read from a quantised file give the blocks of that file again, bit by bit, if its codes span their
    range in every block, as llama.cpp writes them without an importance matrix: the largest and smallest value of a
    block then give its 16-bit scale and minimum again, because float32 holds their product with a code nearly exactly.

    Args:
      path: the file to write; an existing one is replaced.
      architecture: the value of ``general.architecture``, such as ``llama``.
      metadata: fields of the file: bool, int, float, str or a list of one of these. A whole number becomes uint32 if
        it fits (int32 in lists), and a float becomes float32, as llama.cpp expects. The fields that the writer sets
        (architecture and alignment) are passed over, so that the metadata of another file can be given.
      tokenizer: more fields, those of the tokenizer: ``tokenizer.ggml.*`` and ``tokenizer.chat_template``.
      tensors: what to write, in this order.

    Raises:
      ConfigError: a field or tensor cannot be written, or the package gguf is not installed.
      ModelFileError: the disk is full or the folder cannot be written.
    """
    require_gguf()
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    path = Path(path)
    planned = list(tensors)
    incomplete = path.with_name(f"{path.name}.incomplete")
    writer = GGUFWriter(incomplete, architecture)
    quantised = any(tensor.type.startswith("Q") for tensor in planned)
    version = {"general.quantization_version": GGML_QUANT_VERSION} if quantised else {}
    for name, value in {**version, **metadata, **tokenizer}.items():
        if name not in ("general.architecture", "general.alignment"):
            _add_field(writer, name, value)
    for tensor in planned:
        _plan(writer, tensor)
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                writer.write_tensor_data(_stored(tensor))
        finally:
            writer.close()
        os.replace(incomplete, path)
    except OSError as error:
        raise ModelFileError(f"cannot write {path} ({error}); free disk space or choose another path") from error
    finally:
        incomplete.unlink(missing_ok=True)


def _add_field(writer: "GGUFWriter", name: str, value: Any) -> None:
    from gguf import GGUFValueType

    if isinstance(value, list | tuple):
        kinds = {type(entry) for entry in value}
        if len(kinds) != 1 or (kind := _entry_kind(value)) is None:
            raise ConfigError(f"the field {name!r} must be a list of entries of one type, and at least one; change it")
        writer.add_key_value(name, list(value), GGUFValueType.ARRAY, sub_type=kind)
        return
    if (kind := _kind(value)) is None:
        raise ConfigError(f"the field {name!r} is {value!r}, which GGUF cannot hold; give a bool, number, text or list")
    writer.add_key_value(name, value, kind)


def _kind(value: Any) -> "GGUFValueType | None":
    from gguf import GGUFValueType

    match value:
        case bool():
            return GGUFValueType.BOOL
        case int() if value in _UINT32:
            return GGUFValueType.UINT32
        case int() if -(2**63) <= value < 2**63:
            return GGUFValueType.INT64
        case float():
            return GGUFValueType.FLOAT64 if _FLOAT32 < abs(value) < float("inf") else GGUFValueType.FLOAT32
        case str():
            return GGUFValueType.STRING
    return None


def _entry_kind(values: Sequence[Any]) -> "GGUFValueType | None":
    from gguf import GGUFValueType

    if type(values[0]) is int and all(value in _INT32 for value in values):
        return GGUFValueType.INT32
    kinds = {_kind(value) for value in values}
    return kinds.pop() if len(kinds) == 1 else None


def _plan(writer: "GGUFWriter", tensor: ExportTensor) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if tensor.type not in get_args(ExportType):
        raise ConfigError(
            f"the tensor {tensor.name!r} cannot be written as {tensor.type}; choose {', '.join(get_args(ExportType))}"
        )
    kind = GGMLQuantizationType[tensor.type]
    values, n_bytes = GGML_QUANT_SIZES[kind]
    if not tensor.shape or min(tensor.shape) < 1 or tensor.shape[-1] % values:
        raise ConfigError(
            f"the tensor {tensor.name!r} of shape {tensor.shape} cannot be written as {tensor.type}, which needs rows "
            f"of a multiple of {values} values; choose F16 or F32 for it"
        )
    total = int(np.prod(tensor.shape)) // values * n_bytes
    try:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), total, raw_dtype=kind)
    except ValueError as error:
        raise ConfigError(f"the tensor {tensor.name!r} is given twice; give every tensor a name of its own") from error


def _stored(tensor: ExportTensor) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.ascontiguousarray(tensor.read())
    if values.shape != tensor.shape:
        raise ConfigError(f"the tensor {tensor.name!r} has the shape {values.shape} and was planned as {tensor.shape}")
    values = values.astype(np.float32, copy=False)
    largest = float(max(values.max(), -values.min()))
    if not largest <= (_FLOAT32 if tensor.type == "F32" else _FLOAT16):  # NaN is not, either
        raise ConfigError(
            f"the tensor {tensor.name!r} has the value {largest}, which {tensor.type} cannot hold; write finite values "
            "(large ones as F32)"
        )
    kind, rows = GGMLQuantizationType[tensor.type], values.reshape(-1, values.shape[-1])
    step = max(1, SPAN // values.shape[-1])  # gguf makes several copies of what it converts
    first = quantize(rows[:step], kind)
    stored = np.empty((len(rows), first.shape[-1]), first.dtype)
    for start in range(0, len(rows), step):
        stored[start : start + step] = quantize(rows[start : start + step], kind)
    return stored.reshape(*values.shape[:-1], -1)
