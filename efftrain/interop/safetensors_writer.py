"""Writes safetensors files tensor by tensor, in any order, so that no file is ever held in memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
BLOCK_BYTES = 8 * 2**20  # of a tensor that is converted and written at once
DTYPES = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16), "float16": ("F16", np.float16)}


class SafetensorsWriter:
    """A folder of safetensors files with an index if there are several.

    Args:
      folder: where the files go.
      tensors: name -> (dtype as safetensors names it, dtype of numpy, shape), in the order of the files.
      shard_bytes: largest number of bytes of a file, unless one tensor is larger.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, np.dtype, tuple[int, ...]]],
        *,
        shard_bytes: int = SHARD_BYTES,
    ):
        shards: list[dict[str, tuple[str, np.dtype, tuple[int, ...]]]] = [{}]
        size = total = 0
        for name, (code, dtype, shape) in tensors.items():
            n_bytes = dtype.itemsize * int(np.prod(shape))
            if shards[-1] and size + n_bytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = code, dtype, shape
            size, total = size + n_bytes, total + n_bytes
        self._places: dict[str, tuple[Path, int, np.dtype, tuple[int, ...]]] = {}
        self._left = set(tensors)
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
            weight_map |= dict.fromkeys(shard, file)
            self._begin(folder / file, shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _begin(self, file: Path, shard: Mapping[str, tuple[str, np.dtype, tuple[int, ...]]]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (code, dtype, shape) in shard.items():
            begin, end = end, end + dtype.itemsize * int(np.prod(shape))
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        for name, (_, dtype, shape) in shard.items():
            begin = header[name]["data_offsets"][0]  # ty: ignore[not-subscriptable]
            self._places[name] = file, 8 + len(text) + begin, dtype, shape

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor, converted to its dtype.

        Raises:
          ValueError: it has another shape than was announced, or was written before.
        """
        file, offset, dtype, shape = self._places[name]
        if array.shape != shape or name not in self._left:
            raise ValueError(f"{name} of shape {array.shape} was announced as {shape}, or is written twice")
        with file.open("r+b") as stream:
            stream.seek(offset)
            rows = np.atleast_1d(array)
            step = max(1, BLOCK_BYTES * len(rows) // max(rows.nbytes, 1))
            for start in range(0, len(rows), step):
                np.ascontiguousarray(rows[start : start + step], dtype).tofile(stream)
        self._left.remove(name)

    def close(self) -> None:
        """Makes sure that everything is on disk.

        Raises:
          ValueError: a tensor was not written.
        """
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were not written, such as {min(self._left)}")
        for file in {place[0] for place in self._places.values()}:
            with file.open("r+b") as stream:
                os.fsync(stream.fileno())
