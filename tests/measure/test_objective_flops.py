"""FLOPs of objectives beside those of the model."""

from dataclasses import dataclass, replace

import pytest

from efftrain.measure.cost.flops import head_flops, training_flops
from efftrain.measure.cost.objective_flops import objective_flops
from efftrain.models.config import LayerDropout, llama
from efftrain.models.decoder import abstract_decoder
from efftrain.train.config import Training
from efftrain.train.objectives.objective import EarlyExitLoss, SelfDistillation, next_token_loss
from efftrain.train.objectives.teacher import Teacher

MODEL = llama(vocab_size=32, d_model=8, n_layers=4, n_heads=2, d_ff=8, max_length=16)
LARGE = MODEL.replace(d_model=16)
TRAINING = Training(steps=100, batch_size=2, length=8)
FORWARD = training_flops(abstract_decoder(MODEL), 8) / 3


@dataclass(frozen=True)
class WithTeacher:
    teacher: Teacher | None


class WithNumber:
    def extra_flops(self, model, training):
        return 7.0 * model.d_model * training.length


def test_an_objective_without_other_passes_adds_nothing():
    assert objective_flops(next_token_loss, MODEL, TRAINING) == 0
    assert objective_flops(WithTeacher(None), MODEL, TRAINING) == 0


def test_exits_cost_their_heads_from_the_step_on_at_which_they_begin():
    model = MODEL.replace(layer_dropout=LayerDropout(rate=0.1, after=75))
    loss = EarlyExitLoss(after=75, stride=2)
    assert objective_flops(loss, model, TRAINING) == pytest.approx(3 * head_flops(abstract_decoder(MODEL)) / 2 / 4)


def test_self_distillation_costs_a_forward_pass_after_the_checkpoint():
    assert objective_flops(SelfDistillation(), MODEL, TRAINING) == pytest.approx(FORWARD)
    branch = replace(TRAINING, resume_from="runs/float@80")
    assert objective_flops(SelfDistillation(), MODEL, branch) == pytest.approx(0.2 * FORWARD)


def test_a_teacher_costs_its_forward_pass_unless_the_objective_says_more():
    teacher = Teacher(config=LARGE, restore=lambda state: state)
    expected = training_flops(abstract_decoder(LARGE), 8) / 3
    assert objective_flops(WithTeacher(teacher), MODEL, TRAINING) == pytest.approx(expected)
    assert objective_flops(WithNumber(), MODEL, TRAINING) == 7 * 8 * 8
