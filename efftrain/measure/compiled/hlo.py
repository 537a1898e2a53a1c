"""Analyses the text of a compiled XLA program: how often each part runs, its FLOPs, memory traffic and collectives.

XLA's own cost analysis counts the body of a loop once and does not report collectives. Here every instruction counts as
often as it runs. The text is that of ``jax.stages.Compiled.as_text()``, the program of one device.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property

from efftrain.measure.compiled.hlo_products import product_flops
from efftrain.measure.compiled.hlo_text import Array, Computation, Instruction, parse
from efftrain.measure.compiled.replica_groups import first_group

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_CALLS = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective operation of the program.

    Attributes:
      kind: one of ``KINDS``.
      size: bytes of the whole array, as in ``roofline.sent_bytes``.
      group: the devices that device 0 exchanges data with, including itself, as positions in the flattened mesh.
      count: how often it runs in a step.
      in_loop: whether it is in the body of a loop.
      source: the JAX operation that it comes from.
    """

    kind: str
    size: float
    group: tuple[int, ...]
    count: int
    in_loop: bool
    source: str


class ProgramText:
    """A parsed program.

    Attributes:
      computations: the computations by name.
      entry: name of the computation where the program begins.
      runs: how often each computation runs in a step.
      unknown_loops: names of the loops whose trip count could not be read; their bodies count once.
    """

    def __init__(self, text: str):
        self.computations, self.entry = parse(text)
        self.unknown_loops: list[str] = []
        self.runs: dict[str, int] = defaultdict(int)
        self._in_loop: set[str] = set()
        self._fused: set[str] = set()
        self._visit(self.entry, 1, looped=False, fused=False)

    def _visit(self, name: str, times: int, *, looped: bool, fused: bool) -> None:
        self.runs[name] += times
        if looped:
            self._in_loop.add(name)
        if fused:
            self._fused.add(name)
        for instruction in self.computations[name].instructions.values():
            for callee, rounds in self._callees(instruction):
                if callee in self.computations:
                    in_fusion = fused or instruction.opcode not in ("while", "conditional", "call")
                    self._visit(callee, times * rounds, looped=looped or instruction.opcode == "while", fused=in_fusion)

    def _callees(self, instruction: Instruction) -> list[tuple[str, int]]:
        found = _CALLS.findall(instruction.rest)
        for branches in _BRANCHES.findall(instruction.rest):
            found += [name.strip().lstrip("%") for name in branches.split(",")]
        rounds = self._trip_count(instruction) if instruction.opcode == "while" else 1
        return [(name, rounds) for name in found]

    def _trip_count(self, loop: Instruction) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        if known:
            return int(known[1])
        condition, body = (
            self.computations.get(_matched(rf"{part}=%?([\w.\-]+)", loop.rest)[1]) for part in ("condition", "body")
        )
        limit = _counter_limit(condition) if condition else None
        if limit is None or body is None:
            self.unknown_loops.append(loop.name)
            return 1
        number, end = limit
        # XLA unrolls loops of a product and its gather by two, so that the counter may increase by more than 1.
        step = _counter_step(body, number)
        if step is None:
            self.unknown_loops.append(loop.name)
        return -(-end // (step or 1))

    @cached_property
    def flops(self) -> float:
        """FLOPs of all products in a step on one device; a multiply-add is 2 FLOPs."""
        return sum(
            times * product_flops(instruction, self.computations[name])
            for name, times in self.runs.items()
            for instruction in self.computations[name].instructions.values()
            if instruction.opcode in ("dot", "convolution")
        )

    @cached_property
    def kernels(self) -> tuple[int, float]:
        """Pallas kernels in a step: the number of runs without a cost estimate, and the FLOPs of those with one."""
        unknown, flops = 0, 0.0
        for name, times in self.runs.items():
            for instruction in self.computations[name].instructions.values():
                if 'custom_call_target="tpu_custom_call"' in instruction.rest:
                    estimate = re.search(r'"flops":\s*"?(\d+)"?', instruction.rest)
                    unknown += 0 if estimate else times
                    flops += times * int(estimate[1]) if estimate else 0
        return unknown, flops

    @cached_property
    def memory_bytes(self) -> float:
        """Bytes that a step moves to and from the memory of one device.

        Those are the operands and results of instructions that are not inside of a fusion.
        """
        return sum(
            times * self._moved(instruction, self.computations[name])
            for name, times in self.runs.items()
            if name not in self._fused
            for instruction in self.computations[name].instructions.values()
        )

    def _moved(self, instruction: Instruction, within: Computation) -> float:
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        if instruction.opcode in ("copy-start", "slice-start"):  # (source, destination, semaphore)
            source, destination = instruction.arrays[:2]
            return destination.n_bytes * (2 - source.on_chip - destination.on_chip)
        reads = [within.instructions[name] for name in instruction.operands if name in within.instructions]
        written, callee = _hbm(instruction.arrays), None
        if instruction.opcode == "fusion" and (found := _CALLS.search(instruction.rest)):
            callee = self.computations.get(found[1])
        if callee is None:
            if instruction.opcode in ("dynamic-slice", "slice", "gather"):
                return 2 * written
            if instruction.opcode == "dynamic-update-slice":
                return 2 * _hbm(reads[1].arrays) if len(reads) > 1 else written
            return written + sum(_hbm(i.arrays) for i in reads)
        sliced = _sliced_parameters(callee)
        total = sum(min(sliced.get(k, math.inf), _hbm(i.arrays)) for k, i in enumerate(reads))
        if callee.root.opcode == "dynamic-update-slice":  # it works in place and writes only the update
            update = callee.instructions.get(callee.root.operands[1])
            written = min(written, sum(a.n_bytes for a in update.arrays)) if update else written
        return total + written

    @cached_property
    def collectives(self) -> list[Collective]:
        """All collectives, largest traffic first; a collective that is spread over several fusions counts once."""
        found: dict[str, list[Collective]] = defaultdict(list)
        for name, times in self.runs.items():
            for instruction in self.computations[name].instructions.values():
                kind = instruction.opcode.removesuffix("-start")
                if kind not in KINDS:
                    continue
                if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"  # on TPUs, a fused all-reduce of which each device keeps a part
                group = first_group(instruction.rest)
                collective = Collective(
                    kind=kind,
                    size=_collective_size(kind, instruction, len(group)),
                    group=group,
                    count=times,
                    in_loop=name in self._in_loop,
                    source=_source(instruction),
                )
                # The pieces of an asynchronous collective share a channel; loops that it overlaps with do not repeat
                # it.
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                chained = channel and "chain_id=" in instruction.rest
                found[f"{kind} {channel[1]}" if chained else f"{name} {instruction.name}"].append(collective)
        once = [min(same, key=lambda c: c.count) for same in found.values()]
        return sorted(once, key=lambda c: -c.size * c.count)


# Opcodes that move no bytes themselves: they rename a buffer, or the computations that they call are counted.
_FREE = frozenset(
    {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "partition-id", "replica-id"}
)
_FREE |= {"while", "conditional", "call", "after-all", "async-update", "opt-barrier"}


def _hbm(arrays: list[Array]) -> float:
    return sum(a.n_bytes for a in arrays if not a.on_chip)


def _matched(pattern: str, text: str) -> re.Match[str]:
    """Returns the first match in the text of an instruction, whose opcode says that there is one."""
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiled program has an instruction without {pattern!r}: {text}")
    return match


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    match = re.match(r"(\d+)\)", instruction.rest)
    return int(match[1]) if match else None


def _element(instruction: Instruction) -> int | None:
    """The index of a get-tuple-element instruction; None for other instructions."""
    match = instruction.opcode == "get-tuple-element" and re.search(r"index=(\d+)", instruction.rest)
    return int(match[1]) if match else None


def _counter_limit(condition: Computation) -> tuple[int, int] | None:
    """The index of the counter in a loop's state, and its limit, for a loop from 0 to a constant; otherwise None."""
    counters = [n for i in condition.instructions.values() if (n := _element(i)) is not None]
    ends = {n for i in condition.instructions.values() if (n := _constant(i)) is not None}
    return (counters[0], ends.pop()) if len(counters) == 1 and len(ends) == 1 else None


def _counter_step(body: Computation, number: int) -> int | None:
    """The constant that a loop adds to its counter in a round; None if it cannot be read."""
    operands, step = body.root.operands, 0
    at = body.instructions.get(operands[number]) if number < len(operands) else None
    while at is not None:
        if _element(at) == number:
            return step or None
        parts = [body.instructions.get(name) for name in at.operands]
        if at.opcode in ("copy", "bitcast") and len(parts) == 1:
            at = parts[0]
            continue
        amounts = [n for part in parts if (n := _constant(part)) is not None]
        rest = [part for part in parts if _constant(part) is None]
        if at.opcode != "add" or len(amounts) != 1:
            return None
        step, at = step + amounts[0], rest[0]
    return None


def _source(instruction: Instruction) -> str:
    match = re.search(r'op_name="([^"]*)"', instruction.rest)
    return match[1] if match else ""


def _collective_size(kind: str, instruction: Instruction, n: int) -> float:
    if not instruction.opcode.endswith("-start"):
        total = sum(a.n_bytes for a in instruction.arrays)
        return total * n if instruction.opcode == "reduce-scatter" else total
    total = sum(a.n_bytes for a in instruction.arrays if a.dims)  # without scalars, which only synchronise
    if kind == "all-gather":
        return total * n / (n + 1)  # the type lists the inputs too, and the results are n times as large
    if kind == "collective-permute":
        return total / 2  # the type lists input and result
    return total


def _sliced_parameters(fused: Computation) -> dict[int, float]:
    """The parameters of a fusion of which it only reads slices, with the bytes of these slices."""
    slices: dict[int, float] = {}
    for parameter in fused.instructions.values():
        if parameter.opcode != "parameter":
            continue
        users = [i for i in fused.instructions.values() if parameter.name in i.operands]
        number = int(_matched(r"^\d+", parameter.rest)[0])
        if users and all(u.opcode in ("dynamic-slice", "slice", "gather") for u in users):
            slices[number] = sum(a.n_bytes for u in users for a in u.arrays)
        elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
            slices[number] = 0.0
    return slices
