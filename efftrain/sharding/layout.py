"""Derives the sharding of a whole state from the logical axes on its parameters, and shows it as a table."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from rich.filesize import decimal
from rich.table import Table

from efftrain.errors import ConfigError
from efftrain.sharding.rules import DEFAULT_RULES, Axes, ShardingRules, without_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """Placement of one array of a state. Bytes are those of the values, without padding by the device."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    axes: Axes
    spec: PartitionSpec
    bytes_total: int
    bytes_per_device: int

    @property
    def replicated(self) -> bool:
        return not any(self.spec)


def state_shardings(state: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Any:
    """Returns the sharding of every array in a tree of NNX variables: parameters, model state, optimizer state.

    optax builds its moments by mapping over the parameters, so they are variables with the same ``axes``, and are
    sharded like their parameter. Outside variables, scalars and vectors (counts, keys) are replicated.

    Args:
      state: a pytree of arrays or ``jax.ShapeDtypeStruct``s, e.g. ``nnx.split(nnx.eval_shape(build))[1]`` or
        ``jax.eval_shape(optimizer.init, params)``.
      mesh: the mesh.
      rules: which mesh axis splits which logical axis.

    Returns:
      The same structure with a ``NamedSharding`` for each array, for ``out_shardings`` of ``jax.jit``.

    Raises:
      ConfigError: a variable has no ``axes``, an array of two or more dimensions is in no variable, or
        ``ShardingRules.resolve`` fails.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        name, metadata = _name(path), leaf.get_metadata() if is_variable(leaf) else None
        # A variable is itself a tree: of one array, or of none if optax masked it.
        return jax.tree.map(lambda x: NamedSharding(mesh, _spec(name, x, metadata, mesh, rules)), leaf)

    return jax.tree_util.tree_map_with_path(place, state, is_leaf=is_variable)


def with_shardings(state: Any, shardings: Any) -> Any:
    """Returns ``jax.ShapeDtypeStruct``s that carry their sharding, which Orbax needs to restore."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings)


def layout(state: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> list[Placed]:
    """Returns how each array of ``state`` is placed, in tree order; arguments and errors as in ``state_shardings``."""
    leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_variable)
    shardings = jax.tree.leaves(state_shardings(state, mesh, rules), is_leaf=is_variable)
    rows = []
    for (path, leaf), sharding_leaf in zip(leaves, shardings, strict=True):
        axes = leaf.get_metadata().get("axes") or () if is_variable(leaf) else ()
        for x, sharding in zip(jax.tree.leaves(leaf), jax.tree.leaves(sharding_leaf), strict=True):
            rows.append(
                Placed(
                    path=_name(path),
                    shape=x.shape,
                    dtype=x.dtype,
                    axes=axes,
                    spec=sharding.spec,
                    bytes_total=math.prod(x.shape) * x.dtype.itemsize,
                    bytes_per_device=math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize,
                )
            )
    return rows


def layout_table(state: Any, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Table:
    """Returns ``layout`` as a table for a person: a row for each array, then the sums."""
    rows = layout(state, mesh, rules)
    table = Table()
    table.add_column("parameter", overflow="fold")
    for heading in ("shape", "type", "logical axes", "split over"):
        table.add_column(heading)
    table.add_column("bytes/device", justify="right")
    for row in rows:
        table.add_row(
            row.path,
            " x ".join(map(str, row.shape)) or "scalar",
            str(row.dtype),
            ", ".join("-" if axis is None else axis for axis in row.axes),
            _show(row.spec),
            decimal(row.bytes_per_device),
        )
    table.add_section()
    whole = sum(row.bytes_total for row in rows)
    kept = sum(row.bytes_per_device for row in rows if row.replicated)
    table.add_row(f"total ({decimal(whole)} in all)", *[""] * 4, decimal(sum(r.bytes_per_device for r in rows)))
    table.add_row("of which replicated", *[""] * 4, decimal(kept))
    return table


def _spec(name: str, x: Any, metadata: dict[str, Any] | None, mesh: Mesh, rules: ShardingRules) -> PartitionSpec:
    if len(x.shape) == 0 or (metadata is None and len(x.shape) == 1):
        return PartitionSpec()
    if metadata is None:
        raise ConfigError(
            f"{name}: this array of shape {x.shape} is not in an nnx.Variable, so its layout is unknown; "
            "keep the nnx.State (a pure dictionary has lost the axes), or wrap it in a Variable with axes=..."
        )
    if metadata.get("axes") is None:
        raise ConfigError(
            f"{name}: this variable of shape {x.shape} names no logical axes; build it with axes=(...), "
            "one name or None for each dimension"
        )
    return rules.resolve(metadata["axes"], x.shape, mesh, units=metadata.get("units"), name=name)


def copy_to(array: Array, sharding: Sharding) -> Array:
    """Copies an array to a sharding. Donating the copy leaves the array as it is.

    ``jax.device_put(..., may_alias=False)`` does not promise that: where it replicates an array of one device, the copy
    on that device is the array itself (jax 0.10.2).
    """
    with without_mesh():  # the array may be on other devices than the mesh
        own = jnp.copy(array)
    return jax.device_put(own, sharding)


def is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _show(spec: PartitionSpec) -> str:
    """The mesh axes of each dimension, such as ``fsdp, tensor``; ``-`` is a dimension that is kept whole."""
    parts = ["-" if entry is None else entry if isinstance(entry, str) else "+".join(entry) for entry in spec]
    return ", ".join(parts) or "replicated"
