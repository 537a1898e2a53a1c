"""The state of a run: everything that a checkpoint must hold, as one pytree."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from efftrain.models.decoder import Decoder


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State of a run.

    Attributes:
      step: () int32, number of steps taken.
      params: trained parameters, float32.
      model_state: variables of the model that are not trained.
      opt_state: state of the optimizer.
      ema: exponential moving average of the parameters (see ``averages``), or None.
      key: (2,) uint32, data of the run's random key; a step folds its number into the key.
      bad_steps: () int32, number of consecutive steps up to this one whose loss or gradient was not finite.
      skipped: () int32, number of all such steps. ``step - skipped`` updates were made.
    """

    step: Array
    params: nnx.State
    model_state: nnx.State
    opt_state: Any
    ema: nnx.State | None
    key: Array
    bad_steps: Array
    skipped: Array


def split_model(model: Decoder) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into its static graph, its trained parameters and all other variables."""
    graph, params, model_state = nnx.split(model, nnx.Param, ...)
    return graph, params, model_state


def init_state(
    build: Callable[[nnx.Rngs], Decoder], optimizer: optax.GradientTransformation, *, seed: int, ema: bool
) -> TrainState:
    """Creates a new state; call it under ``jax.jit`` with shardings, so that no device ever holds a whole parameter.

    Args:
      build: function that builds the model.
      optimizer: its state is initialised from the parameters.
      seed: seed of the parameters and of the run's random key.
      ema: whether the state holds an average of the parameters.
    """
    model_key, run_key = jax.random.split(jax.random.key(seed))
    _, params, model_state = split_model(build(nnx.Rngs(params=model_key)))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        # A copy: the step donates its state, and one buffer must not be donated twice.
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        key=jax.random.key_data(run_key),
        bad_steps=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
    )


def merge_model(graph: nnx.GraphDef, state: TrainState) -> Decoder:
    """Returns the model of a state, with the averaged parameters if the run keeps them.

    The model holds the state's arrays in its own variables, so that assigning to the model leaves the state unchanged.
    ``helpers``, which an objective trains beside the model, are left out.
    """
    model = nnx.merge(graph, state.params if state.ema is None else state.ema, state.model_state, copy=True)
    if hasattr(model, "helpers"):
        del model.helpers
    return model
