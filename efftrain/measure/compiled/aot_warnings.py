"""Warnings about a compiled step: memory and traffic that a better layout would not need."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from efftrain.measure.compiled.aot_traffic import Traffic
from efftrain.measure.compiled.hlo import ProgramText
from efftrain.sharding.layout import Placed

TILE = (8, 128)  # rows and columns of a TPU register; the last two dimensions are padded to multiples of it


def parameter_warnings(rows: list[Placed], mesh: Mesh, *, tiled: bool) -> list[str]:
    """Warns about parameters that are replicated on every device, or whose shards a TPU pads by more than 10 %.

    Args:
      rows: the layout of the parameters; only those of more than 1 % of the model's bytes are checked.
      mesh: the mesh.
      tiled: whether the device pads arrays to tiles, as TPUs do.
    """
    whole, found = sum(row.bytes_total for row in rows), []
    splitting = math.prod(size for axis, size in mesh.shape.items() if axis != "replica")
    for row in rows:
        if row.bytes_total <= 0.01 * whole:
            continue
        if row.replicated and splitting > 1:
            found.append(
                f"{row.path} is replicated on every device ({row.bytes_total / 1e6:.1f} MB); give its axes a rule"
            )
        padded = _padded_bytes(row, mesh)
        if tiled and padded > 1.1 * row.bytes_per_device:
            shard = " x ".join(map(str, _shard_shape(row, mesh)))
            found.append(
                f"{row.path}: its shard of {shard} is padded to tiles of {TILE[0]} x {TILE[1]}, "
                f"{padded / row.bytes_per_device:.2f} times its size; make its dimensions multiples of the tile, or "
                "split it less"
            )
    return found


def loop_warnings(text: ProgramText, collectives: list[Traffic], params: Any) -> list[str]:
    """Warns about traffic in loops that a better layout would avoid, and about loops that could not be counted.

    The traffic is all-gathers that are larger than the parameters that FSDP must gather, and all-reduces along fsdp.

    Args:
      text: the program.
      collectives: its traffic.
      params: abstract parameters, and those of a teacher.
    """
    found = [f"loop {name}: its number of iterations could not be read; counted once" for name in text.unknown_loops]
    largest = 0
    for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        stacked = "layers" in (leaf.get_metadata().get("axes") or ())
        largest = max(largest, leaf.size * 4 // (leaf.shape[0] if stacked else 1))
    found += [
        f"an all-gather over {'+'.join(row.axes)} in a loop makes {row.largest / 1e6:.1f} MB, and the largest "
        f"parameter of a layer has {largest / 1e6:.1f} MB: an activation is gathered ({row.source}); "
        "constrain its sharding"
        for row in collectives
        if row.kind == "all-gather" and row.in_loop and row.largest > largest
    ]
    everything = sum(row.sent for row in collectives)
    found += [
        f"all-reduces over {'+'.join(row.axes)} in a loop send {100 * row.sent / everything:.0f} % of the bytes, twice "
        "what a scatter or gather would: XLA chooses them for small shards; split the parameters less, with replica"
        for row in collectives
        if row.kind == "all-reduce" and row.in_loop and "fsdp" in row.axes and row.sent > everything / 4
    ]
    return found


def _shard_shape(row: Placed, mesh: Mesh) -> tuple[int, ...]:
    return jax.sharding.NamedSharding(mesh, row.spec).shard_shape(row.shape)


def _padded_bytes(row: Placed, mesh: Mesh) -> int:
    """Bytes of a shard after padding, in the better order of its last two dimensions, since XLA chooses the layout."""
    shape = _shard_shape(row, mesh)
    orders = {shape, (*shape[:-2], *shape[-2:][::-1])}
    return min(math.prod(_to_tiles(order)) for order in orders) * row.dtype.itemsize


def _to_tiles(shape: tuple[int, ...]) -> list[int]:
    tiles = ([1] * len(shape) + list(TILE))[-len(shape) :]
    return [-(-n // tile) * tile for n, tile in zip(shape, tiles, strict=True)]
