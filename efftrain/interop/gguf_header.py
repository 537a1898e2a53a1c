"""Reads the header of a GGUF file: metadata, and name, shape, type and place of every tensor.

The reader of the package gguf is not used: it cuts off what lies beyond the end of the file instead of failing, loops
over any count that a damaged header states, and needs seconds for a vocabulary.

Source: the specification in docs/gguf.md of the ggml repository, versions 2 and 3.
"""

import itertools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MOST_DIMENSIONS = 4  # GGML_MAX_DIMS
DEFAULT_ALIGNMENT = 32

_U8, _I8, _U16, _I16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64, _F64 = range(13)
_SCALARS = {
    _U8: "<u1",
    _I8: "<i1",
    _U16: "<u2",
    _I16: "<i2",
    _U32: "<u4",
    _I32: "<i4",
    _F32: "<f4",
    _BOOL: "<?",
    _U64: "<u8",
    _I64: "<i8",
    _F64: "<f8",
}
_LENGTH = struct.Struct("<Q")


# Number of a tensor type -> its name, values per block and bytes per block; None: there is no such type.
TensorTypes = Callable[[int], tuple[str, int, int] | None]


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies in the file.

    Attributes:
      shape: row-major, (out, in) for a matrix; GGUF itself lists the dimensions in reverse.
      type: name of the type in ggml, such as ``F16`` or ``Q4_1``.
      offset: bytes from the start of the file.
      n_bytes: size in the file, without padding.
    """

    shape: tuple[int, ...]
    type: str
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata, as plain Python values, and the tensors in the order of the file."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(path: Path, data: memoryview, types: TensorTypes) -> GgufHeader:
    """Reads the header of a GGUF file and checks that every tensor lies inside of the file.

    Args:
      path: for messages.
      data: the whole file, as a memory map; only the header is touched.
      types: the known tensor types.

    Raises:
      ModelFileError: the file is no GGUF file, damaged, incomplete, or one part of a model in several files.
    """
    cursor = _Cursor(path, data)
    if bytes(data[:4]) != MAGIC:
        raise ModelFileError(f"{path} is not a GGUF file (it does not begin with GGUF); give the path of a .gguf file")
    cursor.at = 4
    version = cursor.number(_U32, "the version")
    if version not in VERSIONS:
        raise ModelFileError(
            f"{path} has version {version} of GGUF, and only 2 and 3 in little-endian order can be read; "
            "convert the model again with a current llama.cpp"
        )
    n_tensors, n_fields = cursor.number(_U64, "the number of tensors"), cursor.number(_U64, "the number of fields")
    cursor.check_count(n_fields, 8 + 4 + 1, "fields")  # the smallest: an empty name, a type, a byte
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.text("the name of a field")
        if name in metadata:
            raise cursor.damaged(f"the field {name!r} is there twice")
        metadata[name] = cursor.value(name)
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        raise ModelFileError(
            f"{path} is one of {parts} files of a model; merge them with: llama-gguf-split --merge {path} MERGED.gguf"
        )
    cursor.check_count(n_tensors, 8 + 4 + 8 + 4 + 8, "tensors")
    tensors = _tensors(cursor, n_tensors, _alignment(cursor, metadata), types)
    return GgufHeader(metadata, tensors)


class _Cursor:
    """A position in the file; every read checks that the file reaches that far."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def damaged(self, problem: str) -> ModelFileError:
        return ModelFileError(f"{self.path} is damaged or incomplete: {problem}; download or convert it again")

    def take(self, n_bytes: int, what: str) -> memoryview:
        start, end = self.at, self.at + n_bytes
        if end > len(self.data):
            raise self.damaged(f"the file ends at byte {len(self.data)}, within {what}")
        self.at = end
        return self.data[start:end]

    def number(self, kind: int, what: str) -> Any:
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def check_count(self, count: int, smallest: int, what: str) -> None:
        if count * smallest > len(self.data) - self.at:
            raise self.damaged(f"it states {count} {what}, more than the file has room for")

    def text(self, what: str) -> str:
        (length,) = _LENGTH.unpack(self.take(8, what))
        try:
            return str(self.take(length, what), "utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, name: str) -> Any:
        what = f"the field {name!r}"
        kind = self.number(_U32, what)
        if kind == _STRING:
            return self.text(what)
        if kind == _ARRAY:
            return self._array(what)
        if kind not in _SCALARS:
            raise self.damaged(f"{what} has the unknown type {kind}")
        return self.number(kind, what)

    def _array(self, what: str) -> list[Any]:
        kind, length = self.number(_U32, what), self.number(_U64, what)
        if kind == _STRING:
            self.check_count(length, 8, f"entries in {what}")
            return [self.text(what) for _ in range(length)]
        if kind not in _SCALARS:
            raise self.damaged(f"{what} is a list of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        self.check_count(length, dtype.itemsize, f"entries in {what}")
        return np.frombuffer(self.take(length * dtype.itemsize, what), dtype).tolist()


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    found = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(found, int) or found < 1 or found & (found - 1):
        raise cursor.damaged(f"general.alignment is {found!r} and must be a power of two")
    return found


def _tensors(cursor: _Cursor, count: int, alignment: int, types: TensorTypes) -> dict[str, GgufTensor]:
    stated = {}
    for _ in range(count):
        name = cursor.text("the name of a tensor")
        if name in stated:
            raise cursor.damaged(f"the tensor {name!r} is there twice")
        stated[name] = _stated(cursor, name, types)
    start = -(-cursor.at // alignment) * alignment
    found = {}
    for name, (shape, kind, n_bytes, offset) in stated.items():
        what = f"the tensor {name!r}"
        if offset % alignment:
            raise cursor.damaged(f"{what} begins at {offset}, which is no multiple of the alignment {alignment}")
        if start + offset + n_bytes > len(cursor.data):
            raise cursor.damaged(f"{what} ends at byte {start + offset + n_bytes} and the file at {len(cursor.data)}")
        found[name] = GgufTensor(shape, kind, start + offset, n_bytes)
    in_order = sorted(found, key=lambda name: found[name].offset)
    for one, other in itertools.pairwise(in_order):
        if found[one].offset + found[one].n_bytes > found[other].offset:
            raise cursor.damaged(f"the tensors {one!r} and {other!r} overlap")
    return found


def _stated(cursor: _Cursor, name: str, types: TensorTypes) -> tuple[tuple[int, ...], str, int, int]:
    """Returns shape, type, size and offset from the start of the data, as the header states them."""
    what = f"the tensor {name!r}"
    n_dimensions = cursor.number(_U32, what)
    if not 1 <= n_dimensions <= MOST_DIMENSIONS:
        raise cursor.damaged(f"{what} has {n_dimensions} dimensions, and 1 to {MOST_DIMENSIONS} are possible")
    shape = tuple(cursor.number(_U64, what) for _ in range(n_dimensions))[::-1]
    number, offset = cursor.number(_U32, what), cursor.number(_U64, what)
    if (kind := types(number)) is None:
        raise ModelFileError(
            f"{cursor.path}: {what} has the unknown type {number}; the file is damaged, or newer than the package "
            "gguf (pip install -U gguf)"
        )
    type_name, per_block, block_bytes = kind
    if min(shape) < 1 or shape[-1] % per_block:
        raise cursor.damaged(f"{what} has the shape {shape}, which is impossible for {type_name}")
    return shape, type_name, math.prod(shape) // per_block * block_bytes, offset
