"""The training step: sums gradients over micro-batches, divides once by the number of targets, and updates once."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from efftrain.sharding.rules import constrain
from efftrain.train.averages import average_decay, averaged
from efftrain.train.objectives.objective import WHOLE, Batch, Metrics, Objective, Whole
from efftrain.train.objectives.teacher import TeacherObjective, objective_at
from efftrain.train.state import TrainState, split_model

Step = Callable[[TrainState, Batch, nnx.State | None], tuple[TrainState, Metrics]]


def make_step(
    graph: nnx.GraphDef,
    objective: Objective | TeacherObjective,
    optimizer: optax.GradientTransformation,
    *,
    n_steps: int = 1,
    n_microbatches: int = 1,
    ema_decay: float | None = None,
    learning_rate: optax.Schedule | None = None,
) -> Step:
    """Returns the training step as a pure function; the caller jits it and donates the state.

    If the loss or a gradient is not finite, the step leaves parameters, model state, optimizer state and average
    unchanged and only updates ``step``, ``bad_steps`` and ``skipped``.

    Args:
      graph: static part of the model.
      objective: the loss function, see ``objectives.objective`` and ``objectives.teacher``.
      optimizer: transformation of the gradients of ``TrainState.params``.
      n_steps: number of steps of the run, from which a ``TeacherObjective`` knows the progress.
      n_microbatches: number of parts into which the rows are split, processed one after the other; must divide the
        batch size.
      ema_decay: decay of the averaged parameters, if the state has them; see ``averages.average_decay``.
      learning_rate: the learning rate in ``optimizer``, for the metrics. None: it is not reported.

    Returns:
      Function (state, batch, variables of the objective's teacher or None) -> (state, metrics as (sum, count) pairs).
      Metrics: ``loss``, those of the objective, ``grad_norm`` before clipping, ``lr``, ``skipped`` (1 for a step that
      was not finite) and ``bad_steps`` (number of consecutive steps that were not finite).
    """

    def step(state: TrainState, batch: Batch, frozen: nnx.State | None = None) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        now = objective_at(objective, frozen, state.step / n_steps)
        loss, count, metrics, gradients = accumulate(
            partial(_value_and_gradient, graph, now, state), batch, key, n_microbatches
        )
        gradients = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), gradients)
        model_state, figures = _after_step(graph, state, metrics.pop("statistics", None))
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            assert ema_decay is not None  # the state has an average only if the run keeps one
            ema = averaged(params, ema, average_decay(ema_decay, state.step - state.skipped), opt_state)

        def keep(new, old):
            return jax.tree.map(partial(jnp.where, finite), new, old)

        after = dataclasses.replace(
            state,
            step=state.step + 1,
            params=keep(params, state.params),
            model_state=keep(model_state, state.model_state),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            bad_steps=jnp.where(finite, 0, state.bad_steps + 1),
            skipped=state.skipped + (1 - finite),
        )
        values = {"grad_norm": norm, "skipped": 1 - finite, "bad_steps": after.bad_steps}
        if learning_rate is not None:
            # On the device: on the host it would wait for the next step. By the optimizer's own count of updates.
            values["lr"] = learning_rate(state.step - state.skipped)
        return after, {"loss": (loss, count)} | metrics | figures | {name: (v, 1) for name, v in values.items()}

    return step


def batch_axes(shape: tuple[int, ...], length: int) -> tuple[str | None, ...]:
    """Logical axes of an array of a batch: "batch", and "length" for a second axis that has the rows' length."""
    second = ("length" if n == length and i == 0 else None for i, n in enumerate(shape[1:]))
    return "batch", *second


def accumulate(gradient_of: Callable, batch: Batch, key: Array, n_microbatches: int):
    """Sums (loss, count, metrics, gradients) over micro-batches; the sums equal those of the whole batch.

    Micro-batch i takes the rows i, i + n, i + 2n, ..., so that each device keeps its rows. Each micro-batch also holds
    the whole batch and the step's key, as ``objective.Whole``.

    Some results depend on the split, because a micro-batch computes them from its tokens together: the balance loss of
    experts (a product of two means), the tokens that a fixed capacity drops, the predictions of a recursion's later
    rounds where rows have padding, and draws with a key per micro-batch (layer dropout, answers of ``OnPolicy``).

    Args:
      gradient_of: (batch, key) -> (loss, count, metrics, gradients), all sums.
      batch: arrays (batch_size, ...).
      key: random key of the step.
      n_microbatches: must divide batch_size.
    """
    if n_microbatches == 1:
        return gradient_of(batch, key)

    length = batch["tokens"].shape[1]

    def part(a: Array) -> Array:
        axes = batch_axes(a.shape, length)
        a = a.reshape(a.shape[0] // n_microbatches, n_microbatches, *a.shape[1:])
        return constrain(jnp.swapaxes(a, 0, 1), None, *axes)

    whole = {WHOLE: Whole(batch, key)}

    def add(total, inputs):
        rows, key = inputs
        return jax.tree.map(jnp.add, total, gradient_of(rows | whole, key)), None

    micro, keys = jax.tree.map(part, dict(batch)), jax.random.split(key, n_microbatches)
    shapes = jax.eval_shape(gradient_of, jax.tree.map(lambda a: a[0], micro) | whole, keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (micro, keys))[0]


def _after_step(graph: nnx.GraphDef, state: TrainState, statistics: Any) -> tuple[nnx.State, Metrics]:
    """Updates the model's untrained variables once, from the statistics of the whole step; returns them and figures."""
    if statistics is None:
        return state.model_state, {}
    model = nnx.merge(graph, state.params, state.model_state, copy=True)  # a copy, because ``after_step`` assigns to it
    figures = model.after_step(statistics)
    return split_model(model)[2], figures


def _value_and_gradient(graph, objective, state, batch, key):
    def loss_of(params):
        loss, count, metrics = objective(nnx.merge(graph, params, state.model_state, copy=True), batch, key)
        return loss, (count, metrics)

    (loss, (count, metrics)), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return loss, count, metrics, gradients
