"""A student and its teacher: what is minimised, what is frozen, what is refused."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny_models import build, config, tokens

from efftrain.compress.distillation.distill import Distill, FromCache, FromTeacher, check_vocabulary, distilled
from efftrain.compress.distillation.features import HiddenStates, Relations
from efftrain.compress.distillation.on_policy import OnPolicy
from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths
from efftrain.ops.divergence import generalized_jsd
from efftrain.sharding.mesh import MeshConfig, make_mesh
from efftrain.sharding.rules import DEFAULT_RULES
from efftrain.train.config import Training
from efftrain.train.objectives.objective import next_token_loss
from efftrain.train.objectives.teacher import Teacher, Together
from efftrain.train.program import make_program
from efftrain.train.schedules import Ramp
from efftrain.train.start import start_from
from efftrain.train.state import merge_model

LENGTH = 16
TRAINING = Training(steps=4, batch_size=4, length=LENGTH)
STUDENT = config()
NARROW = config(d_model=8)


def batch(rows=4, prompt=0):
    t = tokens(rows, LENGTH + 1, seed=5)
    ones = np.ones((rows, LENGTH), np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ones.shape)
    mask = np.broadcast_to(np.arange(LENGTH) >= prompt, ones.shape)
    return {"tokens": t[:, :-1], "targets": t[:, 1:], "segments": ones, "positions": positions, "mask": mask}


def teacher_of_seed(seed=7, model=STUDENT):
    return Teacher.of(build(model, seed))


def variables(teacher):
    return teacher.place(make_mesh(MeshConfig(), jax.devices()[:1]), DEFAULT_RULES)


def loss_of(how, student, teacher, progress=0.0, given=None, key=0):
    objective = FromTeacher(how=how, teacher=teacher_of_seed(model=teacher.config)).at(teacher, jnp.float32(progress))
    return objective(student, given or batch(), jax.random.key(key))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_objective_is_the_mixture_at_its_place_in_the_schedule(beta):
    student, teacher = build(STUDENT), build(STUDENT, 7)
    how = Distill(alpha=Ramp(start=1.0, end=0.2, shape="linear"), temperature=Ramp(start=2.0, end=1.0), beta=beta)
    given = batch()
    total, count, metrics = loss_of(how, student, teacher, progress=0.5)
    alpha, t = 0.6, 1.5
    x, y = student(given["tokens"]), teacher(given["tokens"])
    nll = optax.losses.softmax_cross_entropy_with_integer_labels(x, given["targets"]).sum()
    far = t**2 * generalized_jsd(x / t, y / t, beta).sum()
    np.testing.assert_allclose(total, alpha * far + (1 - alpha) * nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"][0], nll, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/teacher"][0], generalized_jsd(x, y, 0.0).sum(), rtol=1e-5)
    assert count == given["mask"].sum()


def test_evaluation_is_that_of_the_text_alone():
    student = build(STUDENT)
    objective = FromTeacher(how=Distill(), teacher=teacher_of_seed()).at(build(STUDENT), jnp.float32(0))
    found, want = objective(student, batch(), None), next_token_loss(student, batch(), None)
    jax.tree.map(np.testing.assert_array_equal, found, want)


def test_steps_bring_the_student_to_its_teacher_which_stays_as_it_is():
    teacher = teacher_of_seed()
    how = Distill()
    make, objective = distilled(lambda rngs: Decoder(NARROW, rngs=rngs), NARROW, how, teacher)
    program = make_program(make, objective, replace(TRAINING, steps=40))
    state, frozen = jax.jit(program.init)(), variables(teacher)
    before, step, seen = jax.tree.map(np.array, frozen), jax.jit(program.step), []
    given = batch()
    for _ in range(40):
        state, metrics = step(state, given, frozen)
        seen.append(float(metrics["loss/teacher"][0] / metrics["loss/teacher"][1]))
    assert seen[-1] < 0.7 * seen[0]
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (STUDENT.vocab_size, STUDENT.d_model) not in shapes  # no teacher in what a checkpoint holds


def test_microbatches_change_nothing():
    teacher = teacher_of_seed()
    found = []
    for n in (1, 2):
        program = make_program(
            lambda rngs: Decoder(NARROW, rngs=rngs),
            FromTeacher(how=Distill(alpha=Ramp(start=0.5)), teacher=teacher),
            replace(TRAINING, n_microbatches=n),
        )
        state, metrics = jax.jit(program.step)(jax.jit(program.init)(), batch(), variables(teacher))
        found.append((state.params, metrics["loss/teacher"][0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *found)


def test_a_teacher_may_be_held_in_fewer_bytes():
    teacher = dataclasses.replace(teacher_of_seed(), dtype="bfloat16")
    state, whole = variables(teacher), variables(teacher_of_seed())
    matrices = [a for a in jax.tree.leaves(state) if a.dtype == jnp.bfloat16]
    n_bytes = [sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(s)) for s in (state, whole)]
    assert len(matrices) > 4
    assert n_bytes[0] < 0.55 * n_bytes[1]
    near = loss_of(Distill(), build(STUDENT), teacher.merge(state))[2]["loss/teacher"][0]
    exact = loss_of(Distill(), build(STUDENT), build(STUDENT, 7))[2]["loss/teacher"][0]
    np.testing.assert_allclose(near, exact, rtol=0.05)


def test_hidden_states_of_equal_models_are_near_and_of_others_not():
    how, teacher = Distill(features=HiddenStates()), build(STUDENT)
    same = loss_of(how, build(STUDENT), teacher)[2]["loss/features"][0]
    other = loss_of(how, build(STUDENT, 9), teacher)[2]["loss/features"][0]
    np.testing.assert_allclose(same, 0, atol=1e-3)
    assert other > 1


def test_hidden_states_by_hand():
    """Of layer 0 beside layer 2, by the streams themselves."""
    student, teacher = build(STUDENT), build(STUDENT, 9)
    given = batch(prompt=5)
    total, count, metrics = loss_of(Distill(features=HiddenStates(layers=((0, 2),))), student, teacher, given=given)
    streams = []
    for model, layer in ((student, 0), (teacher, 2)):
        x = model.embedding(given["tokens"])
        for block in model.layers()[: layer + 1]:
            x, _ = block(x, given["positions"], given["segments"])
        streams.append(np.asarray(x, np.float64))
    a, b = streams
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(metrics["loss/features"][0], ((1 - cosine) * given["mask"]).sum(), rtol=1e-3)
    np.testing.assert_allclose(total, metrics["loss/teacher"][0] + metrics["loss/features"][0], rtol=1e-4)
    assert count == given["mask"].sum()


def test_projections_are_trained_and_no_part_of_the_student():
    teacher = teacher_of_seed()
    how = Distill(features=HiddenStates())
    make, objective = distilled(lambda rngs: Decoder(NARROW, rngs=rngs), NARROW, how, teacher)
    program = make_program(make, objective, TRAINING)
    before = jax.jit(program.init)()
    after, metrics = jax.jit(program.step)(before, batch(), variables(teacher))
    helpers = [jax.tree.leaves(state.params["helpers"]) for state in (before, after)]
    assert [h.shape for h in helpers[0]] == [(8, STUDENT.d_model)] * NARROW.n_layers
    assert all((a != b).any() for a, b in zip(*helpers, strict=True))
    assert "helpers" not in nnx.state(merge_model(program.graph, after))
    assert np.isfinite(metrics["loss/features"][0])


def test_relations_do_not_ask_for_equal_heads_or_widths():
    how = Distill(features=Relations(heads=2))
    teacher = build(STUDENT)
    same = loss_of(how, build(STUDENT), teacher)[2]["loss/features"][0]
    other = loss_of(how, build(NARROW), teacher)[2]["loss/features"][0]
    np.testing.assert_allclose(same, 0, atol=1e-3)
    assert other > 0.01


def test_relations_see_neither_the_future_nor_other_documents():
    """The relation of a token to those it may see, by hand for its queries, keys and values."""
    features, given = Relations(heads=1), batch(rows=1)
    given["segments"] = np.asarray([[1] * 6 + [2] * 10], np.int32)
    student, teacher = build(NARROW), build(STUDENT)
    found = loss_of(Distill(features=features), student, teacher, given=given)[2]["loss/features"][0]
    want = 0.0
    streams = []
    for model in (student, teacher):
        x = model.embedding(given["tokens"])
        for block in model.layers()[:-1]:
            x, _ = block(x, given["positions"], given["segments"])
        block = model.layers()[-1]
        h = block.attention_norm(x)
        streams.append([np.asarray(p(h), np.float64)[0] for p in
                        (block.attention.query, block.attention.key, block.attention.value)])  # fmt: skip
    for s, t in zip(*streams, strict=True):
        for i in range(LENGTH):
            seen = [j for j in range(i + 1) if given["segments"][0, j] == given["segments"][0, i]]
            p, q = (np.exp(a[seen] @ a[i] / np.sqrt(a.shape[1])) for a in (t, s))
            p, q = p / p.sum(), q / q.sum()
            want += (p * np.log(p / q)).sum() / 3
    np.testing.assert_allclose(found, want, rtol=1e-3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"vocab_size is \d+ and the teacher's is \d+"):
        check_vocabulary(STUDENT, replace(STUDENT, vocab_size=STUDENT.vocab_size + 1))
    with pytest.raises(ConfigError, match=r"distill\.beta is 1.5"):
        Distill(beta=1.5)
    with pytest.raises(ConfigError, match=r"distill\.alpha is 2.0"):
        Distill(alpha=Ramp(start=0.5, end=2.0))
    for wrong in (
        {"beta": 0.5},
        {"temperature": Ramp(start=2.0)},
        {"features": HiddenStates()},
        {"on_policy": OnPolicy()},
    ):
        with pytest.raises(ConfigError, match=rf"distill\.{next(iter(wrong))} needs the teacher itself"):
            FromCache(how=Distill(**wrong), tail=True)
    with pytest.raises(ConfigError, match=r"features\.layers has"):
        distilled(build, STUDENT, Distill(features=HiddenStates(layers=((0, 9),))), teacher_of_seed())
    with pytest.raises(ConfigError, match=r"features\.heads is 3"):
        distilled(build, STUDENT, Distill(features=Relations(heads=3)), teacher_of_seed())


def test_a_student_with_projections_may_start_from_a_model():
    """Which has none of them."""
    narrow, teacher = build(NARROW, 3), teacher_of_seed()
    make, objective = distilled(
        lambda rngs: Decoder(NARROW, rngs=rngs), NARROW, Distill(features=HiddenStates()), teacher
    )
    program = make_program(make, objective, TRAINING)
    state = start_from(narrow, jax.jit(program.init)())
    assert "helpers" in state.params
    np.testing.assert_array_equal(merge_model(program.graph, state)(tokens()), narrow(tokens()))


def test_a_teacher_that_looks_ahead_is_refused():
    routed = replace(STUDENT.pattern[0], depth=MixtureOfDepths(capacity=0.5, causal="none"))
    ahead = STUDENT.replace(pattern=(routed,))
    with pytest.raises(ConfigError, match="looking ahead"):
        distilled(build, STUDENT, Distill(), Teacher.of(build(ahead)))


def test_a_teacher_of_routed_depth_teaches_what_it_would_decode():
    """A later token must not change what it says of earlier ones."""
    routed = replace(STUDENT.pattern[0], depth=MixtureOfDepths(capacity=0.5))
    teacher = Teacher.of(build(STUDENT.replace(pattern=(routed,))))
    model = teacher.merge(variables(teacher))
    one, other = tokens(2, LENGTH), tokens(2, LENGTH)
    other[:, -4:] = (other[:, -4:] + 1) % STUDENT.vocab_size
    np.testing.assert_allclose(model(one)[:, :-4], model(other)[:, :-4], rtol=1e-4, atol=1e-5)


def test_two_objectives_are_two_means():
    """The second one's sum over fewer targets weighs as its mean does."""
    student, teacher, given = build(STUDENT), build(STUDENT, 7), batch()

    def half(model, rows, key):
        few = rows | {"mask": rows["mask"] & (np.arange(LENGTH) % 2 == 0)}
        return next_token_loss(model, few, key)

    first = FromTeacher(how=Distill(), teacher=teacher_of_seed())
    together = Together(first=first, second=half).at(teacher, jnp.float32(0))
    total, count, _ = together(student, given, jax.random.key(0))
    alone = first.at(teacher, jnp.float32(0))(student, given, jax.random.key(0))
    other = half(student, given, None)
    np.testing.assert_allclose(total / count, alone[0] / alone[1] + other[0] / other[1], rtol=1e-5)


def test_the_whole_distribution_in_a_cache_teaches_as_the_teacher_does():
    student, teacher, given = build(NARROW), build(STUDENT), batch()
    probs = jax.nn.softmax(teacher(given["tokens"]))
    ids = jnp.broadcast_to(jnp.arange(STUDENT.vocab_size), probs.shape)
    how = Distill(alpha=Ramp(start=0.8))
    cached = FromCache(how=how, tail=True).at(None, jnp.float32(0))
    gradients = []
    for objective, extra in ((cached, {"teacher_ids": ids, "teacher_probs": probs}), (None, {})):

        def loss(state, objective=objective, extra=extra):
            model = nnx.merge(nnx.split(student)[0], state)
            if objective is None:
                return loss_of(how, model, teacher)[0]
            return objective(model, given | extra, jax.random.key(0))[0]

        gradients.append(jax.grad(loss)(nnx.state(student)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), *gradients)
