"""Arrays that are written to a checkpoint, and read from one, block by block, so that none is held as a whole."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals, Future

from efftrain.train.checkpoints.fingerprints import BlockFingerprint

BLOCK_BYTES = 8 * 2**20
Index = tuple[slice, ...]


@dataclass(frozen=True)
class StreamedArray:
    """An array whose blocks are made when they are written.

    Attributes:
      shape: shape of the array.
      dtype: dtype of the array.
      read: returns the block at an index of ``blocks``.
      fingerprint: of the array, as ``fingerprints.fingerprints`` computes it of an array in memory.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]
    fingerprint: int

    @classmethod
    def read_once(cls, shape: tuple[int, ...], dtype: np.dtype, read: Callable[[Index], np.ndarray]) -> "StreamedArray":
        """Reads all blocks for the fingerprint; ``read`` must return the same blocks when they are written."""
        found = BlockFingerprint()
        for index in blocks(shape, block_shape(shape, dtype.itemsize)):
            found.add(read(index))
        return cls(shape, dtype, read, found.value)


def block_shape(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Returns the shape of the blocks of an array: consecutive in memory, and of at most ``BLOCK_BYTES`` or one row.

    Args:
      shape: shape of the array.
      itemsize: bytes of a number.
    """
    found = list(shape)
    for axis in range(len(shape) - 1):
        row = itemsize * math.prod(shape[axis + 1 :])
        found[axis] = max(1, min(shape[axis], BLOCK_BYTES // max(row, 1)))
        if found[axis] > 1 or row <= BLOCK_BYTES:
            break
    return tuple(found)


def blocks(shape: Sequence[int], steps: Sequence[int]) -> Iterator[Index]:
    """Yields the indices of the blocks of shape ``steps`` of an array, in the order of the array."""
    ranges = [range(0, size, step or 1) for size, step in zip(shape, steps, strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(s, min(s + step, n)) for s, step, n in zip(starts, steps, shape, strict=True))


def streamed_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns Orbax's handler of a state whose leaves are ``StreamedArray``s; it is read as any other."""
    registry = type_handlers.create_type_handler_registry((StreamedArray, _StreamedArrayHandler()))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


class _StreamedArrayHandler(type_handlers.NumpyHandler):
    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Future]:
        del args  # no options of Orbax are used
        return [CommitFutureAwaitingContractedSignals(_write(values, infos), name="streamed arrays")]


async def _write(values: Sequence[StreamedArray], infos: Sequence[Any]) -> None:
    for value, info in zip(values, infos, strict=True):
        await info.await_path_creation()
        spec = type_handlers.get_json_tspec_write(
            info,
            use_ocdbt=True,
            global_shape=value.shape,
            local_shape=value.shape,
            dtype=value.dtype,
            process_index=jax.process_index(),
        )
        steps = block_shape(value.shape, value.dtype.itemsize)
        spec["metadata"]["chunks"] = [max(1, step) for step in steps]
        store = await tensorstore.open(tensorstore.Spec(spec), create=True, open=True, context=info.ts_context)
        for index in blocks(value.shape, steps):
            await store[index].write(value.read(index), can_reference_source_data_indefinitely=True)


def read_blocks(folder: str, name: str, fingerprint: int) -> Iterator[tuple[Index, np.ndarray]]:
    """Yields (index, block) of a stored array: blocks that are consecutive in memory, and as small as its chunks allow.

    Args:
      folder: folder or URL of a checkpoint's state, in the format of Orbax (zarr in OCDBT).
      name: name of the array.
      fingerprint: of the array, compared after the last block.

    Raises:
      ValueError: the array is damaged; TensorStore has further classes of errors.
    """
    base = folder if "://" in folder else {"driver": "file", "path": folder}
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
    store = tensorstore.open(spec, read=True).result()
    steps = list(store.shape)
    for axis, size in enumerate((store.chunk_layout.read_chunk.shape or ())[:-1]):
        steps[axis] = min(size or steps[axis], steps[axis])
        if steps[axis] > 1:
            break
    found = BlockFingerprint()
    for index in blocks(store.shape, steps):
        block = store[index].read().result()
        found.add(block)
        yield index, block
    if found.value != fingerprint:
        raise ValueError(f"{name} differs from what was saved")
