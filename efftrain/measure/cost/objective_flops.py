"""FLOPs that an objective spends in addition to the training of the model itself."""

from typing import Protocol, runtime_checkable

from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, head_flops, training_flops
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.train.config import Training
from efftrain.train.objectives.objective import EarlyExitLoss, Objective, SelfDistillation
from efftrain.train.objectives.teacher import TeacherObjective, teacher_of


@runtime_checkable
class StatesExtraFlops(Protocol):
    """An objective that states its own FLOPs."""

    def extra_flops(self, model: ModelConfig, training: Training) -> float:
        """Returns the FLOPs per training token in addition to ``training_flops``, averaged over all steps."""
        ...


def objective_flops(objective: Objective | TeacherObjective, model: ModelConfig, training: Training) -> float:
    """FLOPs per training token of the run in addition to ``training_flops``, averaged over all steps.

    Counted are the heads of an ``EarlyExitLoss``, the float forward pass of a ``SelfDistillation`` (not for the steps
    before ``resume_from``, which had none), and the forward pass of a teacher. An objective that is
    ``StatesExtraFlops`` gives the number itself; any other objective gives 0.

    Args:
      objective: the objective of the run.
      model: configuration of the trained model.
      training: configuration of the training.
    """
    if isinstance(objective, StatesExtraFlops):
        return objective.extra_flops(model, training)
    if isinstance(objective, EarlyExitLoss):
        heads = objective.heads(model.n_layers, training.steps)
        return FORWARD_AND_BACKWARD * heads * head_flops(abstract_decoder(model))
    if isinstance(objective, SelfDistillation):
        return forward_flops(model, training.length) * (1 - training.first_step / training.steps)
    teacher = teacher_of(objective)
    return 0.0 if teacher is None else forward_flops(teacher.config, training.length)


def forward_flops(model: ModelConfig, length: int) -> float:
    """FLOPs of a forward pass per token, for rows of ``length`` tokens."""
    return training_flops(abstract_decoder(model), length) / FORWARD_AND_BACKWARD
