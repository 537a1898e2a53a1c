"""Everything that a run must remember, as one pytree."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """State of a run.

    Attributes:
      step: () int32, steps taken.
      params: what is trained, float32.
      model_state: variables of the model that are not trained.
      opt_state: the optimizer's.
      ema: exponential moving average of params (see ``averages``), or None.
      key: (2,) uint32 data of the run's random key; a step uses it folded with its number.
      bad_steps: () int32, consecutive steps up to this one whose loss or gradient was not finite.
      skipped: () int32, all such steps. ``step - skipped`` updates were made.
    """

    step: Array
    params: nnx.State
    model_state: nnx.State
    opt_state: Any
    ema: nnx.State | None
    key: Array
    bad_steps: Array
    skipped: Array


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """A static graph, the trained parameters, and every other variable."""
    return nnx.split(model, nnx.Param, ...)


def init_state(
    build: Callable[[nnx.Rngs], nnx.Module], optimizer: optax.GradientTransformation, *, seed: int, ema: bool
) -> TrainState:
    """A new state; call it under ``jax.jit`` with shardings, so that no device ever holds a whole parameter."""
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


def merge_model(graph: nnx.GraphDef, state: TrainState) -> nnx.Module:
    """The model of a state: with the averaged parameters where the run keeps them.

    It holds the state's arrays in variables of its own, so that assigning to the model leaves the state as it is.
    ``helpers``, which an objective had trained beside it, are no part of it.
    """
    model = nnx.merge(graph, state.params if state.ema is None else state.ema, state.model_state, copy=True)
    if hasattr(model, "helpers"):
        del model.helpers
    return model
