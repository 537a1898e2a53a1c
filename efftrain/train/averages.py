"""The exponential moving average of the parameters, which evaluation and ``load`` use where a run keeps it."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array


@runtime_checkable
class Pruning(Protocol):
    """State of an optimizer that prunes: it knows which weights are pruned, which their value 0 alone does not tell."""

    def zero_pruned(self, params: Any) -> Any:
        """A tree like the parameters with zeros for the weights that are pruned."""
        ...


def average_decay(decay: float, updates: Array | int) -> Array:
    """The decay of the average at the update after ``updates`` others: ``min(decay, (1 + updates) / (10 + updates))``.

    With a constant decay the initial parameters keep a weight of ``decay ** updates``, which is 37 % after 1,000
    updates at 0.999. Here the first updates nearly replace the average, so that it is one of trained parameters at any
    length of a run: over about the last ninth of the updates, until that is the time that ``decay`` stands for.

    Args:
      decay: at most.
      updates: () int32, that were made before; skipped steps do not count.

    Source: TensorFlow's ``tf.train.ExponentialMovingAverage``, argument ``num_updates``.
    """
    t = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))


def averaged(params: Any, average: Any, decay: Array, opt_state: Any) -> Any:
    """The average after an update; where a part of the optimizer's state is ``Pruning``, with zeros where it prunes.

    Args:
      params: after the update.
      average: before it.
      decay: () weight of what was averaged before.
      opt_state: after the update.
    """
    average = optax.incremental_update(params, average, 1 - decay)
    for state in jax.tree.leaves(opt_state, is_leaf=_prunes):
        if _prunes(state):
            average = state.zero_pruned(average)
    return average


def _prunes(state: Any) -> bool:
    return isinstance(state, Pruning)
