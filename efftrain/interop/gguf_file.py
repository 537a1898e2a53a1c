"""Reads GGUF files, the format of llama.cpp, tensor by tensor through a memory map."""

import importlib.util
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from efftrain.errors import ConfigError, ModelFileError
from efftrain.interop.gguf_header import GgufTensor, read_header

# K-quants other than these, IQ and ternary types are written for models whose quality they change too much to go on
# from; the types here are checked against formulas in the tests.
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
SPAN = 2**18  # numbers that are converted at once
READABLE = ("F32", "F16", "BF16", *QUANTISED)


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file.

    Attributes:
      path: the file.
      metadata: name of a field -> bool, int, float, str or a list of these.
      tensors: name -> shape in row-major order ((out, in) for a matrix), type name and place, in the file's order.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    _data: memoryview

    @classmethod
    def open(cls, path: Path | str) -> "GgufFile":
        """Opens a file and reads its header.

        Raises:
          ConfigError: the package gguf is not installed.
          ModelFileError: the file is missing, damaged, incomplete or of an unknown version.
        """
        require_gguf()
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except ValueError:  # an empty file cannot be mapped
            raise ModelFileError(f"{path} is empty; download or convert it again") from None
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read ({error}); give the path of a .gguf file") from error
        header = read_header(path, data, _tensor_type)
        return cls(path, header.metadata, header.tensors, data)

    @property
    def architecture(self) -> str:
        """Name of the architecture in llama.cpp, such as ``llama`` or ``qwen2``."""
        found = self.metadata.get("general.architecture")
        if not isinstance(found, str) or not found:
            raise ModelFileError(f"{self.path} has no general.architecture; convert the model again with llama.cpp")
        return found

    def read(self, name: str, index: int | None = None) -> np.ndarray:
        """Reads one tensor; nothing else of the file is held.

        Args:
          name: its name.
          index: reads only this slice along the first axis, such as an expert. None: all.

        Returns:
          An array of the tensor's shape: float32 for F32 and quantised types, float16 for F16, and bfloat16 (of
          ml_dtypes) for BF16. The unquantised types are read-only views of the memory map.

        Raises:
          ModelFileError: there is no such tensor, or its type cannot be read.
        """
        import ml_dtypes
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if (tensor := self.tensors.get(name)) is None:
            raise ModelFileError(f"{self.path} has no tensor {name!r}; convert the model again with llama.cpp")
        if tensor.type not in READABLE:
            raise ModelFileError(
                f"{self.path}: the tensor {name!r} has the type {tensor.type}, and only {', '.join(READABLE)} can be "
                "read; use a file in one of these types"
            )
        raw = np.frombuffer(self._data[tensor.offset : tensor.offset + tensor.n_bytes], np.uint8)
        shape = tensor.shape
        if index is not None:
            raw, shape = raw.reshape(shape[0], -1)[index], shape[1:]
        if tensor.type in QUANTISED:
            found = np.empty(shape, np.float32)
            rows = found.reshape(-1, shape[-1])
            stored = raw.reshape(len(rows), -1)
            step = max(1, SPAN // shape[-1])
            for start in range(0, len(rows), step):  # gguf makes several copies of what it converts
                part = slice(start, start + step)
                rows[part] = dequantize(stored[part], GGMLQuantizationType[tensor.type])
            return found
        dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[tensor.type]
        return raw.view(dtype).reshape(shape)


def llama_rows(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes the permutation of the rows of queries and keys that llama.cpp makes when it converts a Llama.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head together, transformers and efftrain rows i and i + half.
    Only the architecture ``llama`` of GGUF (Llama, Mistral, SmolLM) is permuted; qwen2, qwen3 and gemma are not.

    Args:
      array: (n_heads * d_head, ...), weight or bias of the projection of queries or keys.
      n_heads: number of heads of these rows; for keys, that of the key-value heads.

    Returns:
      The array with the rows of every head in two halves.
    """
    per_head = _split_heads(array, n_heads)
    return per_head.reshape(n_heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def interleaved_rows(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Permutes rows as llama.cpp does for the architecture ``llama``: the inverse of ``llama_rows``."""
    per_head = _split_heads(array, n_heads)
    return per_head.reshape(n_heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def require_gguf() -> None:
    """Checks that the package gguf is installed.

    Raises:
      ConfigError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("GGUF files need the package gguf; install it with: pip install 'efftrain[interop]'")


def _split_heads(array: np.ndarray, n_heads: int) -> np.ndarray:
    if n_heads < 1 or array.shape[0] % (2 * n_heads):
        raise ModelFileError(
            f"{array.shape[0]} rows of queries or keys cannot be divided among {n_heads} heads of an even width; "
            "the head counts of the file do not fit its tensors"
        )
    return array


def _tensor_type(number: int) -> tuple[str, int, int] | None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return None
    return (kind.name, *GGML_QUANT_SIZES[kind]) if kind in GGML_QUANT_SIZES else None
