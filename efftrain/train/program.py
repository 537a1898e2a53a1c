"""The functions of a run, without its data.

The loop runs them; ``measure.compiled.aot`` compiles them for chips that this machine does not have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from efftrain.models.decoder import Decoder
from efftrain.sharding.layout import state_shardings, with_shardings
from efftrain.sharding.rules import DEFAULT_RULES, ShardingRules
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Objective
from efftrain.train.objectives.teacher import Teacher, TeacherObjective, teacher_of
from efftrain.train.optimizers import with_clipping
from efftrain.train.state import TrainState, init_state, split_model
from efftrain.train.step import Step, batch_axes, make_step

Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]


BATCH_TYPES = {"tokens": jnp.int32, "targets": jnp.int32, "segments": jnp.int32, "positions": jnp.int32, "mask": bool}


@dataclass(frozen=True, kw_only=True)
class Program:
    """The functions of a run.

    Attributes:
      graph: static part of the model.
      init: function that creates the first state; to be jitted with the state's shardings.
      step: see ``make_step``; it is called with the state, the batch and ``frozen``.
      teacher: the model whose variables are the third argument of the step. None: the objective has no teacher.
    """

    graph: nnx.GraphDef
    init: Callable[[], TrainState]
    step: Step
    teacher: Teacher | None = None

    def abstract_state(self, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> TrainState:
        """Returns the state as ``jax.ShapeDtypeStruct``s with shardings.

        Raises:
          ConfigError: a parameter cannot be laid out on the mesh.
        """
        abstract = jax.eval_shape(self.init)
        return with_shardings(abstract, state_shardings(abstract, mesh, rules))

    def abstract_frozen(self, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> nnx.State | None:
        """Returns the teacher's variables as ``jax.ShapeDtypeStruct``s with shardings; None if there is no teacher."""
        return None if self.teacher is None else self.teacher.abstract(mesh, rules)

    def frozen(self, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES) -> nnx.State | None:
        """Returns the teacher's variables on the mesh, the third argument of the step; None if there is no teacher."""
        return None if self.teacher is None else self.teacher.place(mesh, rules)

    def jit(self, state: Any) -> Any:
        """Returns the jitted step: it donates the state and returns it with the same shardings."""
        same = jax.tree.map(lambda array: array.sharding, state)  # otherwise XLA may choose others for the result
        return jax.jit(self.step, donate_argnums=0, out_shardings=(same, None))


def make_program(
    build: Callable[[nnx.Rngs], Decoder],
    objective: Objective | TeacherObjective,
    config: Training,
    wrap: Wrap | None = None,
) -> Program:
    """Makes the functions of a run; nothing is computed or allocated. The arguments are those of ``fit``."""
    factor = config.schedule.build(config.steps)
    optimizer = with_clipping(config.optimizer.build(factor), config.clip_norm)
    if wrap is not None:
        optimizer = wrap(optimizer)
    graph = split_model(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]
    step = make_step(
        graph,
        objective,
        optimizer,
        n_steps=config.steps,
        n_microbatches=config.n_microbatches,
        ema_decay=config.ema_decay,
        learning_rate=lambda step: config.optimizer.peak_lr * factor(step),
    )

    def init() -> TrainState:
        return init_state(build, optimizer, seed=config.seed, ema=config.ema_decay is not None)

    return Program(graph=graph, init=init, step=step, teacher=teacher_of(objective))


def batch_sharding(
    config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES, shape: tuple[int, ...] | None = None
) -> NamedSharding:
    """Returns the sharding of an array of a batch.

    Args:
      config: gives batch_size and length.
      mesh: the mesh.
      rules: which mesh axis splits which logical axis.
      shape: shape of the array. None: (batch_size, length).
    """
    shape = (config.batch_size, config.length) if shape is None else shape
    axes = batch_axes(shape, config.length)
    return NamedSharding(mesh, rules.resolve(axes, shape, mesh, name=f"training ({', '.join(map(str, axes))})"))


def abstract_batch(
    config: Training, mesh: Mesh, rules: ShardingRules = DEFAULT_RULES
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns a batch of packed text as ``jax.ShapeDtypeStruct``s with shardings, in the loader's shapes and dtypes."""
    sharding, shape = batch_sharding(config, mesh, rules), (config.batch_size, config.length)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in BATCH_TYPES.items()}
