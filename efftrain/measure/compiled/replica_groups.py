"""Parses which devices take part in a collective, in the notations that XLA uses."""

import math
import re

import numpy as np
from jax.sharding import Mesh


def first_group(text: str) -> tuple[int, ...]:
    """The devices of the first group of a collective; of a permute, all devices connected with its first pair.

    Args:
      text: attributes of a collective instruction: ``replica_groups={{0,1},{2,3}}``, ``replica_groups=[2,4]<=[8]``
        (with or without a transposition), ``replica_groups=mesh['a'=2,'b'=4] {'b'}`` (or with
        ``device_ids``), or ``source_target_pairs=``.

    Returns:
      Positions of devices in the mesh; () if the text names none, which means all devices.
    """
    if match := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", text):
        return _cycle([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", match[1])])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return tuple(int(n) for n in match[1].split(","))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return tuple(int(n) for n in _iota(match[2], match[3]).reshape(-1, _numbers(match[1])[-1])[0])
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[.*?\](?:T\([\d,]+\))?|[\d,]+)\))? \{([^}]*)\}", text
    ):
        return _mesh_group(match[1], match[2], match[3])
    return ()


def group_axes(group: tuple[int, ...], mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes along which the devices of a group differ; for an empty group, all axes of more than one device."""
    if not group:
        return tuple(axis for axis, size in mesh.shape.items() if size > 1)
    coordinates = np.unravel_index(group, mesh.devices.shape)
    return tuple(axis for axis, along in zip(mesh.axis_names, coordinates, strict=True) if len(set(along.tolist())) > 1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """The devices of XLA's iota notation ``[2,4]T(1,0)``: 0, 1, 2, ... in this shape, transposed."""
    sizes = _numbers(dims)
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    return devices.transpose(_numbers(order)) if order else devices


def _mesh_group(sizes_text: str, ids_text: str | None, axes_text: str) -> tuple[int, ...]:
    sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes_text)]
    devices = np.arange(math.prod(size for _, size in sizes))
    if ids_text and (iota := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids_text)):
        devices = _iota(iota[1], iota[2])
    elif ids_text:
        devices = np.array(_numbers(ids_text))
    grid = devices.reshape([size for _, size in sizes])
    names = [name for name, _ in sizes]
    keep: list = [0] * len(sizes)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes_text):
        dim = names.index(name)
        size = sizes[dim][1]
        if not part:
            keep[dim] = slice(None)
        else:  # a part of an axis, which is split into ``before`` blocks of ``part`` pieces each
            step = size // (int(before) * int(part))
            keep[dim] = slice(0, step * int(part), step)
    return tuple(int(n) for n in grid[tuple(keep)].reshape(-1))


def _cycle(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """All devices that are connected with the first pair, directly or through other pairs."""
    after = {}
    for source, target in pairs:
        after.setdefault(source, set()).add(target)
        after.setdefault(target, set()).add(source)
    seen, waiting = set(), [pairs[0][0]] if pairs else []
    while waiting:
        device = waiting.pop()
        if device not in seen:
            seen.add(device)
            waiting += after[device]
    return tuple(sorted(seen))
