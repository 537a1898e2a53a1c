"""The protocol of a run's batches, and how a batch is placed on a mesh."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from efftrain.sharding import hosts
from efftrain.sharding.mesh import make_mesh
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules
from efftrain.train.config import Training
from efftrain.train.program import batch_sharding


class Batches(Protocol):
    """Endless batches of one process, as dicts of NumPy arrays, with a position that can be saved as JSON."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def batch_part(config: Training, rules: ShardingRules = DEFAULT_RULES) -> tuple[int, int]:
    """Returns which part of each global batch this process loads: (number, number of parts), for ``data.batches``.

    Processes whose devices hold the same rows (because a tensor or context axis spans them) load the same part.

    Raises:
      ConfigError: the mesh does not fit the devices, or it gives this process rows that are not contiguous.
    """
    sharding = batch_sharding(config, make_mesh(config.mesh), rules)
    return hosts.part_of_rows(sharding, (config.batch_size, config.length))


def place(
    batch: Mapping[str, np.ndarray], config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, jax.Array]:
    """Makes global arrays (batch_size, ...), sharded over the mesh, from this process's rows."""

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (config.batch_size, *rows.shape[1:])
        sharding = batch_sharding(config, mesh, rules, shape)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: whole(rows) for name, rows in batch.items()}
