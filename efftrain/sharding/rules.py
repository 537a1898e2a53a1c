"""The table from logical axis names to mesh axes, and its resolver, which raises an error if something does not fit.

Model code names what a dimension *is* ("embed", "heads"); only this table says where it goes. A parameter has its names
as metadata: ``nnx.Param(value, axes=("embed", "heads"), units=(d_model, n_heads))``. (They are not called ``sharding``
or ``out_sharding``, because Flax places a variable with metadata of these names when it is created.)
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Generator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from efftrain.errors import ConfigError

Axes = tuple[str | None, ...]


def _mesh_axes(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else tuple(target or ())


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """A table from logical axis names to the mesh axes that split them; ``()`` or None keeps the dimension whole.

    Raises:
      ConfigError: a rule names the same mesh axis twice.
    """

    table: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        table = {name: _mesh_axes(target) for name, target in self.table.items()}
        for name, target in table.items():
            if len(set(target)) < len(target):
                raise ConfigError(f"sharding rule {name} -> {target} names a mesh axis twice; remove one")
        object.__setattr__(self, "table", table)

    def __hash__(self) -> int:
        return hash(frozenset(self.table.items()))

    def replace(self, **changes: str | tuple[str, ...] | None) -> "ShardingRules":
        """Returns the rules with some changed or added: ``rules.replace(kv_heads=None)``."""
        return ShardingRules({**self.table, **{name: _mesh_axes(target) for name, target in changes.items()}})

    def resolve(
        self,
        axes: Axes,
        shape: tuple[int, ...],
        mesh: Mesh | AbstractMesh,
        *,
        units: tuple[int, ...] | None = None,
        name: str = "",
    ) -> PartitionSpec:
        """Returns the partition spec of an array. Mesh axes of size 1 split nothing and are omitted.

        Args:
          axes: a logical name for each dimension; None keeps it whole.
          shape: shape of the whole array.
          mesh: has every mesh axis that the rules in use name.
          units: number of indivisible pieces of each dimension. A (d_model, n_heads * d_head) kernel has (d_model,
            n_heads), because no device may hold half a head. None: the sizes.
          name: name of the parameter, for messages.

        Returns:
          A spec without trailing None, the form in which XLA reports shardings, so that an array from a jitted step
          compares equal to one that did not go through it, and nothing is compiled twice.

        Raises:
          ConfigError: a logical name is unknown, a rule names an axis that the mesh lacks, one mesh axis splits two
            dimensions, or the pieces of a dimension cannot be divided.
        """
        where = name or f"array of shape {tuple(shape)}"
        pieces = tuple(shape) if units is None else tuple(units)
        if not len(axes) == len(shape) == len(pieces):
            raise ConfigError(
                f"{where}: shape {tuple(shape)}, axes {tuple(axes)} and units {units} differ in length; "
                "give one logical axis (or None) and one unit for each dimension"
            )
        entries, taken = [], {}
        for dim, (logical, size, count) in enumerate(zip(axes, shape, pieces, strict=True)):
            split = self.split(logical, mesh, where)
            for axis in split:
                if axis in taken:
                    raise ConfigError(
                        f"{where}: dimensions {taken[axis]} ({axes[taken[axis]]}) and {dim} ({logical}) both "
                        f"go to mesh axis {axis}; map one of them to another axis, or keep it whole (None)"
                    )
                taken[axis] = dim
            _check_divides(where, dim, logical, size, count, {axis: mesh.shape[axis] for axis in split})
            entries.append(split[0] if len(split) == 1 else split or None)
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def split(self, logical: str | None, mesh: Mesh | AbstractMesh, where: str) -> tuple[str, ...]:
        """Returns the mesh axes larger than 1 that split a logical axis; error messages begin with ``where``."""
        if logical is None:
            return ()
        if logical not in self.table:
            raise ConfigError(
                f"{where}: there is no sharding rule for the logical axis {logical!r} (known: "
                f"{', '.join(sorted(self.table))}); add one: give train_and_score or fit "
                f"rules=DEFAULT_RULES.replace({logical}=...)"
            )
        for axis in self.table[logical]:
            if axis not in mesh.shape:
                raise ConfigError(
                    f"{where}: the sharding rule of {logical} names the mesh axis {axis!r}, but the mesh has "
                    f"{', '.join(mesh.axis_names)}; build the mesh with make_mesh, or change the rule"
                )
        return tuple(axis for axis in self.table[logical] if mesh.shape[axis] > 1)


DEFAULT_RULES = ShardingRules(
    {
        # Activations. Their feature dimension is named None: "embed" would ask for fsdp, which the batch uses.
        # Outside the experts, the expert axis splits the batch too.
        "batch": ("replica", "fsdp", "expert"),
        "length": ("context",),
        # Parameters, and the activations that are computed from them along these axes.
        "embed": ("fsdp",),  # exactly once in every large matrix, so that fsdp divides them all
        "vocab": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "mlp": ("tensor",),
        "experts": ("expert",),
        # Kept whole.
        "layers": (),  # the scan slices it: if it were split, every layer would come from another device
        "norm": (),  # a vector: gathering it costs more than keeping it
        "positions": (),  # of a learned table, which is small
        "head_dim": (),  # of normalised queries and keys; a vector too
        "choices": (),  # the experts as a router sees them: every token is compared with all of them
        "groups": (),  # the scales of a quantised matrix along its contraction: there are few
    }
)

_rules: contextvars.ContextVar[ShardingRules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)
_traced_with: dict[AbstractMesh, ShardingRules] = {}


@contextlib.contextmanager
def use(mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> Generator[None]:
    """Context manager that sets the mesh of ``jax.jit``, and the mesh and rules that ``constrain`` follows.

    jax.jit compiles a function again for another mesh, but does not know of the rules. So that no function keeps the
    rules with which it was first traced, other rules for a mesh that was used before clear the compilation cache.
    """
    mesh_key = mesh.abstract_mesh
    if _traced_with.get(mesh_key, DEFAULT_RULES) != rules:
        jax.clear_caches()
    _traced_with[mesh_key] = rules
    token = _rules.set(rules)
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(token)


def without_mesh() -> contextlib.AbstractContextManager[Any]:
    """Context manager in which ``jax.jit`` takes arrays on any devices, even within ``use``."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def constrain(x: jax.Array, *logical_axes: str | None) -> jax.Array:
    """Constrains the sharding of an activation: ``constrain(x_btd, "batch", "length", None)``.

    It does nothing without a mesh, on a single device, and inside ``shard_map``, where x is placed already.

    Raises:
      ConfigError: see ``ShardingRules.resolve``.
    """
    spec = activation_spec(x.shape, *logical_axes)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def activation_spec(shape: tuple[int, ...], *logical_axes: str | None) -> PartitionSpec | None:
    """Returns the spec that ``constrain`` gives an activation of this shape; None if ``constrain`` does nothing."""
    mesh = _current_mesh()
    if mesh is None:
        return None
    name = f"activation ({', '.join(map(str, logical_axes))}) of shape {tuple(shape)}"
    return _rules.get().resolve(logical_axes, shape, mesh, name=name)


def activation_axes(logical: str) -> tuple[str, ...]:
    """Returns the mesh axes that split an activation's dimension of this name; () if ``constrain`` does nothing."""
    mesh = _current_mesh()
    return () if mesh is None else _rules.get().split(logical, mesh, f"activation ({logical})")


def shard_count(*logical_axes: str | None) -> int:
    """Returns the number of shards into which ``constrain`` with these axes divides an activation."""
    mesh, where = _current_mesh(), f"activation ({', '.join(map(str, logical_axes))})"
    if mesh is None:
        return 1
    axes = {axis for logical in logical_axes for axis in _rules.get().split(logical, mesh, where)}
    return math.prod(mesh.shape[axis] for axis in axes)


def _current_mesh() -> AbstractMesh | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.size <= 1 or AxisType.Manual in mesh.axis_types else mesh


def _check_divides(where: str, dim: int, logical: str | None, size: int, count: int, split: dict[str, int]) -> None:
    if count < 1 or size % count:
        raise ConfigError(
            f"{where}: dimension {dim} ({logical}) has size {size}, which its {count} units do not divide; "
            "correct units="
        )
    ways = math.prod(split.values())
    if count % ways:
        held = f"{size}" if count == size else f"{size}, in {count} pieces of {size // count}"
        axis = " x ".join(f"{a}={n}" for a, n in split.items())
        raise ConfigError(
            f"{where}: dimension {dim} ({logical}) has size {held}, which mesh axis {axis} cannot split "
            f"{ways} ways; make {count} a multiple of {ways}, choose a mesh whose {' x '.join(split)} "
            f"divides {count}, or keep the dimension whole: give train_and_score or fit "
            f"rules=DEFAULT_RULES.replace({logical}=None)"
        )
