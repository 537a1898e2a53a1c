"""FLOPs of the products of a compiled program: ``dot``, and ``convolution``, as which TPUs compute products."""

import math
import re

from efftrain.measure.compiled.hlo_text import Computation, Instruction


def product_flops(product: Instruction, within: Computation) -> float:
    """FLOPs of a ``dot`` or ``convolution``; a multiply-add is 2 FLOPs.

    Args:
      product: the instruction.
      within: its computation, which also contains its operands.
    """
    left, right = (within.instructions[name].arrays[0].dims for name in product.operands[:2])
    out = product.arrays[0].dims
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
        return 2.0 * math.prod(out) * math.prod(left[d] for d in dims)
    return _convolution_flops(product.rest, left, right, out)


def _convolution_flops(text: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """FLOPs of a convolution without padding.

    TPUs compute every product as a convolution with batch dimensions as spatial dimensions, so that only pairs of
    output and kernel positions that meet an input element count.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if labels is None:
        raise ValueError(f"the compiled program has a convolution without dim_labels: {text}")
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x\-]+)", _window(text))}
    total = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    for dim in range(len(left) - 2):

        def of(key: str, default: str, dim: int = dim) -> str:
            return window[key][dim] if key in window else default

        low = int(of("pad", "0_0").split("_")[0])
        total *= _valid_pairs(
            size=left[labels[1].index(str(dim))],
            kernel=right[labels[2].index(str(dim))],
            out=out[labels[3].index(str(dim))],
            stride=int(of("stride", "1")),
            low=low,
            dilate=int(of("lhs_dilate", "1")),
            kernel_dilate=int(of("rhs_dilate", "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", text)
    return total / (int(groups[1]) if groups else 1)


def _window(text: str) -> str:
    match = re.search(r"window=\{([^}]*)\}", text)
    return match[1] if match else ""


def _valid_pairs(*, size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Number of (output, kernel) position pairs of one dimension that meet an input element, not padding or a hole."""
    last = (size - 1) * dilate
    return sum(
        0 <= at <= last and at % dilate == 0
        for o in range(out)
        for at in range(o * stride - low, o * stride - low + kernel * kernel_dilate, kernel_dilate)
    )
