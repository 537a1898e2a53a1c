"""Batches of a run: what the loop asks of them, and their place on a mesh."""

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
    """Endless batches of this process, dicts of NumPy arrays, with a position that can be saved as JSON."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...
    def get_state(self) -> Any: ...
    def set_state(self, state: Any) -> None: ...


def batch_part(config: Training, rules: ShardingRules = DEFAULT_RULES) -> tuple[int, int]:
    """Which part of each global batch this process feeds: (number, of how many), for ``data.batches``.

    Processes whose devices hold the same rows (a tensor or context axis goes through them) feed the same part.

    Raises:
      ConfigError: the mesh does not fit the devices, or gives this process rows that do not lie together.
    """
    sharding = batch_sharding(config, make_mesh(config.mesh), rules)
    return hosts.part_of_rows(sharding, (config.batch_size, config.length))


def place(
    batch: Mapping[str, np.ndarray], config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, jax.Array]:
    """This process's rows as parts of global arrays (batch_size, ...), sharded over the mesh."""

    def whole(rows: np.ndarray) -> jax.Array:
        shape = (config.batch_size, *rows.shape[1:])
        sharding = batch_sharding(config, mesh, rules, shape)
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: whole(rows) for name, rows in batch.items()}
