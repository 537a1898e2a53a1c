"""The exponential moving average of the parameters, which evaluation and ``load`` use if a run keeps it."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import Array


@runtime_checkable
class Pruning(Protocol):
    """State of an optimizer that prunes: it knows which weights are pruned, which a value of 0 alone does not tell."""

    def zero_pruned(self, params: Any) -> Any:
        """Returns a tree like the parameters with zeros for the pruned weights."""
        ...


def average_decay(decay: float, updates: Array | int) -> Array:
    """Decay of the average at an update: ``min(decay, (1 + updates) / (10 + updates))``.

    With a constant decay the initial parameters keep a weight of ``decay ** updates``, which is 37 % after 1,000
    updates at 0.999. Here the first updates nearly replace the average, so that it averages trained parameters however
    short the run is: about the last ninth of the updates, until ``decay`` is reached and sets the time span.

    Args:
      decay: largest decay.
      updates: () int32, number of updates made before this one; skipped steps do not count.

    Source: TensorFlow's ``tf.train.ExponentialMovingAverage``, argument ``num_updates``.
    """
    t = jnp.asarray(updates, jnp.float32)
    return jnp.minimum(decay, (1 + t) / (10 + t))


def averaged(params: Any, average: Any, decay: Array, opt_state: Any) -> Any:
    """Returns the average after an update, with zeros for the weights that the optimizer's state prunes (``Pruning``).

    Args:
      params: parameters after the update.
      average: average before the update.
      decay: (), weight of the previous average.
      opt_state: state of the optimizer after the update.
    """
    average = optax.incremental_update(params, average, 1 - decay)
    for state in jax.tree.leaves(opt_state, is_leaf=_prunes):
        if _prunes(state):
            average = state.zero_pruned(average)
    return average


def _prunes(state: Any) -> bool:
    return isinstance(state, Pruning)
