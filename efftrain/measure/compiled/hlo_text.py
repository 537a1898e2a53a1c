"""Parses the text of a compiled XLA program into computations and instructions, for ``measure.compiled.hlo``."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "c64": 8, "c128": 16}
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_ON_CHIP = "S(1)"  # memory space 1 of a TPU is inside of the chip


@dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
      dims: its dimensions.
      n_bytes: its bytes; 4-bit types have half a byte per element.
      on_chip: whether it is in the on-chip memory of a TPU and not in HBM.
    """

    dims: tuple[int, ...]
    n_bytes: float
    on_chip: bool


@dataclass
class Instruction:
    """An instruction of a computation.

    Attributes:
      name: its name.
      arrays: the arrays of its result.
      opcode: such as "dot" or "all-gather-start".
      operands: names of its operands.
      rest: the text after the opcode's parenthesis: operands and attributes.
      root: whether it is the result of the computation.
    """

    name: str
    arrays: list[Array]
    opcode: str
    operands: list[str]
    rest: str
    root: bool


@dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.root)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Parses the text of a program.

    Returns:
      The computations by name, and the name of the computation where the program begins.

    Raises:
      ValueError: the text is not a complete program.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _logical_lines(text):
        if line[:1] not in (" ", "}", "") and line.endswith("{") and not line.startswith("HloModule"):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations[name] = Computation(name)
            entry = name if line.startswith("ENTRY") else entry
        elif line == "}":
            if current is not None and not any(i.root for i in current.instructions.values()):
                raise ValueError(f"computation {current.name} has no result")
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)):
            instruction = _instruction(match[2], match[3], root=bool(match[1]))
            current.instructions[instruction.name] = instruction
    if not entry:
        raise ValueError("the text has no ENTRY computation")
    return computations, entry


def _logical_lines(text: str) -> Iterator[str]:
    """The lines of the text, joining those that line breaks in a kernel's metadata have split."""
    whole, inside = "", False
    for line in text.splitlines():
        if inside and line != "}" and not line.startswith("  "):
            whole += line
            continue
        yield whole
        whole = line
        inside = line != "}" and (inside or (line.endswith("{") and line[:1] not in ("", " ")))
    yield whole


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")  # a type, or a tuple of types
    result, call = text[:end], text[end:].lstrip()
    opcode, _, rest = call.partition("(")
    operands = rest[: _closing("(" + rest, 0) - 1] if rest else ""
    return Instruction(
        name=name,
        arrays=_arrays(result),
        opcode=opcode,
        operands=re.findall(r"%([\w.\-]+)", operands),
        rest=rest,
        root=root,
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    return len(text)


def _arrays(text: str) -> list[Array]:
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(n) for n in dims.split(",") if n)
        bits = re.search(r"\d+", dtype)
        width = BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
        found.append(Array(dims=sizes, n_bytes=math.prod(sizes) * width, on_chip=_ON_CHIP in layout))
    return found
