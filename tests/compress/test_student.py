"""Students that begin with parts of their teacher."""

from dataclasses import replace

import numpy as np
import pytest
from test_one_shot import calibration
from tiny_models import PLAIN, build, config, tokens

from efftrain.compress.distillation.student import (
    cut_from,
    equal_students,
    from_layers,
    same_parameters,
    shape_within,
    spread_layers,
)
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.errors import ConfigError
from efftrain.measure.cost.parameters import count_parameters
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder

DEEP = config(pattern=(PLAIN,), n_repeats=4)


@pytest.mark.parametrize(
    ("n", "of", "want"), [(3, 6, (1, 3, 5)), (4, 6, (1, 2, 4, 5)), (1, 4, (3,)), (4, 4, (0, 1, 2, 3))]
)
def test_layers_at_equal_distances_up_to_the_last(n, of, want):
    found = spread_layers(n, of)
    assert len(found) == n
    assert found[-1] == of - 1
    assert list(found) == sorted(set(found))
    assert found == want
    with pytest.raises(ConfigError, match="use at most as many layers"):
        spread_layers(of + 1, of)


def test_some_layers_compute_what_they_did():
    teacher = build(DEEP)
    student = from_layers(LayerwiseModel.of(teacher), (1, 3))
    assert student.config.n_layers == 2
    x, t = teacher.embedding(tokens()), np.broadcast_to(np.arange(11), (2, 11))
    for i in (1, 3):
        x, _ = teacher.layers()[i](x, t)
    np.testing.assert_allclose(student(tokens()), teacher.logits(teacher.norm(x)), rtol=1e-4, atol=1e-5)


def test_layers_of_two_kinds_keep_their_kind():
    teacher = build(config())  # plain and local, twice
    student = from_layers(LayerwiseModel.of(teacher), (1, 3))
    assert student.config.layers == (teacher.config.layers[1], teacher.config.layers[3])
    assert np.isfinite(student(tokens())).all()


def test_a_cut_has_the_student_shape():
    teacher = build(DEEP)
    student = narrow(DEEP)
    found = cut_from(LayerwiseModel.of(teacher), student, calibration())
    assert found.config == student
    assert shape_within(DEEP, DEEP).d_model == DEEP.d_model
    one_group = DEEP.replace(pattern=(replace(PLAIN, attention=replace(PLAIN.attention, n_kv_heads=1)),))
    assert shape_within(student, one_group).heads == 0.5  # two query heads of four
    whole = cut_from(LayerwiseModel.of(teacher), DEEP, calibration())
    np.testing.assert_allclose(whole(tokens()), teacher(tokens()), rtol=1e-4, atol=1e-4)


def narrow(model: ModelConfig) -> ModelConfig:
    block = replace(PLAIN, attention=replace(PLAIN.attention, n_heads=2, n_kv_heads=1), mlp=replace(PLAIN.mlp, d_ff=8))
    return model.replace(d_model=8, pattern=(block,), n_repeats=2)


def test_another_head_size_cannot_be_cut():
    block = replace(PLAIN, attention=replace(PLAIN.attention, d_head=8))
    with pytest.raises(ConfigError, match="initialise it at random"):
        cut_from(LayerwiseModel.of(build(DEEP)), DEEP.replace(pattern=(block,)), calibration())


def test_students_of_half_the_layers_and_of_narrower_ones_have_about_as_many_parameters():
    teacher = config(vocab_size=16, pattern=(PLAIN,), n_repeats=6, d_model=64)
    half, narrow = equal_students(teacher, 16)
    assert (half.n_layers, half.d_model) == (3, 64)
    assert narrow.n_layers == 6
    assert same_parameters(half, teacher.replace(n_repeats=3))
    sizes = [count_parameters(abstract_decoder(model)).total for model in (half, narrow)]
    assert sizes[1] <= sizes[0]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)
