"""Counts the FLOPs of the matrix products in the trace of a function, without running or compiling it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from efftrain.errors import ConfigError

# Operations for which a trace does not show the size or the number of their products.
UNKNOWN = ("pallas_call", "custom_call", "ffi_call", "conv_general", "ragged_dot", "dot_product_attention")


def traced_flops(function: Callable[..., Any], *arguments: Any, name: str) -> float:
    """FLOPs of the matrix products that a function computes.

    A multiply-add is 2 FLOPs. The body of a scan counts as often as it runs; of a conditional, the most expensive
    branch counts.

    Args:
      function: the function to trace.
      arguments: its arguments, abstract or not.
      name: what error messages call the function.

    Raises:
      ConfigError: the trace has a product that cannot be counted, in a loop of unknown length or in a kernel.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr, name)


def _count(jaxpr: Any, name: str) -> float:
    return sum(_of_equation(equation, name) for equation in jaxpr.eqns)


def _of_equation(equation: Any, name: str) -> float:
    primitive = equation.primitive.name
    if primitive == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)
    if any(part in primitive for part in UNKNOWN):
        raise _uncounted(name, f"the operation {primitive}")
    inner = [_count(jaxpr, name) for jaxpr in _inside(equation.params)]
    if primitive == "while" and sum(inner):
        raise _uncounted(name, "a loop of unknown length")
    if primitive == "cond":
        return max(inner)
    return sum(inner) * equation.params.get("length", 1) if primitive == "scan" else sum(inner)


def _inside(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if hasattr(part, "eqns"):
                yield part
            elif hasattr(part, "jaxpr"):
                yield part.jaxpr


def _uncounted(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"the FLOPs of {name} cannot be counted, as it computes {what}; state them in its configuration "
        "(score_flops or other_flops, see models/components.py)"
    )
