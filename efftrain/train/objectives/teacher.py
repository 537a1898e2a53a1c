"""Teachers: frozen models that an objective reads beside the trained model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.depth.routed_depth import causally_routed
from efftrain.models.quantization import matrices
from efftrain.sharding.layout import copy_to, state_shardings, with_shardings
from efftrain.sharding.rules import ShardingRules
from efftrain.train.objectives.objective import AUXILIARY, Batch, Metrics, Objective


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A frozen model beside the trained one, on the same mesh; it is not part of a checkpoint.

    Attributes:
      config: configuration of the model, which may be stored quantised.
      restore: function from abstract variables with shardings to the variables; called once, when a run starts.
      dtype: dtype to which the model's float32 matrices are cast while it teaches, such as bfloat16, which halves their
        bytes. None: they are not cast.
    """

    config: ModelConfig
    restore: Callable[[nnx.State], nnx.State]
    dtype: str | None = None

    @staticmethod
    def of(model: Decoder, **options: Any) -> "Teacher":
        """Makes a teacher from a model in memory, which stays unchanged."""
        held = nnx.state(model)
        copies = partial(jax.tree.map, lambda old, new: copy_to(old, new.sharding), held)
        return Teacher(config=model.config, restore=copies, **options)

    def abstract_model(self) -> Decoder:
        """Returns the model with shapes in place of arrays."""
        return nnx.eval_shape(self._build)

    def abstract(self, mesh: Mesh, rules: ShardingRules) -> nnx.State:
        """Returns the teacher's variables as ``jax.ShapeDtypeStruct``s with shardings."""
        return _abstract(self.abstract_model(), mesh, rules)

    def place(self, mesh: Mesh, rules: ShardingRules) -> nnx.State:
        """Restores the teacher's variables on the mesh."""
        whole = abstract_decoder(self.config)
        state, wanted = self.restore(_abstract(whole, mesh, rules)), self.abstract(mesh, rules)
        return jax.tree.map(lambda new, old: old.astype(new.dtype), wanted, state)

    def merge(self, state: nnx.State) -> Decoder:
        """Returns the traced model, with gradients stopped; it routes as in decoding, without looking ahead."""
        graph = nnx.split(self.abstract_model())[0]
        return causally_routed(nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, state)))

    def _build(self) -> Decoder:
        model = Decoder(self.config, rngs=nnx.Rngs(0))
        for _, module, attribute in matrices(model) if self.dtype else ():
            variable = getattr(module, attribute)
            if variable.dtype == jnp.float32:
                variable.set_value(variable[...].astype(self.dtype))
        return model


def _abstract(model: Decoder, mesh: Mesh, rules: ShardingRules) -> nnx.State:
    state = nnx.state(model)
    return with_shardings(state, state_shardings(state, mesh, rules))


@runtime_checkable
class TeacherObjective(Protocol):
    """An objective that needs a teacher or the run's progress; ``fit`` accepts it in place of an ``Objective``.

    Attributes:
      teacher: the frozen model that it reads. None: it has no teacher.
    """

    @property
    def teacher(self) -> Teacher | None: ...

    def at(self, teacher: Decoder | None, progress: Array) -> Objective:
        """Returns the objective of a step.

        Args:
          teacher: the model of ``teacher``, or None.
          progress: () float32, the share of the run's steps that are done.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Together:
    """The sum of two objectives, such as a distillation and early exits, each a mean over its own targets.

    Each objective runs the model once. Metrics that both have are taken from the first; statistics and auxiliary losses
    of the model count once.
    """

    first: TeacherObjective
    second: Objective

    @property
    def teacher(self) -> Teacher | None:
        return self.first.teacher

    def at(self, teacher: Decoder | None, progress: Array) -> Objective:
        first = self.first.at(teacher, progress)

        def both(model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
            loss, count, metrics = first(model, batch, key)
            more, n, others = self.second(model, batch, key)
            more -= others.get(AUXILIARY, (0.0, n))[0]
            return loss + more * count / jnp.maximum(n, 1.0), count, others | metrics

        return both


def teacher_of(objective: Objective | TeacherObjective) -> Teacher | None:
    return getattr(objective, "teacher", None)


def objective_at(objective: Objective | TeacherObjective, frozen: nnx.State | None, progress: Array) -> Objective:
    """Returns the objective of a step.

    Args:
      objective: an ``Objective``, returned unchanged, or a ``TeacherObjective``.
      frozen: variables of the objective's teacher, or None.
      progress: () float32, the share of the run's steps that are done.
    """
    if not isinstance(objective, TeacherObjective):
        return objective
    teacher = objective.teacher
    return objective.at(None if frozen is None or teacher is None else teacher.merge(frozen), progress)
