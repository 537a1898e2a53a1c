"""Answers that a student draws for its teacher to judge."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_distill import LENGTH, STUDENT, batch, loss_of, teacher_of_seed
from tiny_models import build
from tiny_runs import write_corpus

from efftrain.compress.distillation.distill import Distill, FromTeacher
from efftrain.compress.distillation.on_policy import OnPolicy
from efftrain.errors import ConfigError
from efftrain.models.decoding.generate import generate
from efftrain.models.decoding.sampling import Sampling

PROMPT, N_NEW = 6, 7


def test_the_answer_is_what_the_student_draws_and_the_mask_covers_it():
    student, given, key = build(STUDENT), batch(prompt=PROMPT - 1), jax.random.key(3)
    found = OnPolicy(fraction=1.0, n_new=N_NEW, end_token=None).answered(student, given, key)
    longest = LENGTH - N_NEW
    drawn = generate(
        student, given["tokens"][:, :longest], jnp.full(4, PROMPT), n_new=N_NEW, sampling=Sampling(temperature=1.0),
        key=key,
    )  # fmt: skip
    np.testing.assert_array_equal(found["tokens"][:, :PROMPT], given["tokens"][:, :PROMPT])
    np.testing.assert_array_equal(found["tokens"][:, PROMPT : PROMPT + N_NEW], drawn)
    for row in range(4):
        counted = np.flatnonzero(found["mask"][row])
        np.testing.assert_array_equal(counted, np.arange(PROMPT - 1, PROMPT + N_NEW - 1))
        np.testing.assert_array_equal(found["targets"][row][counted], drawn[row])
    assert (found["segments"][:, : PROMPT + N_NEW] == 1).all()
    assert (found["segments"][:, PROMPT + N_NEW :] == 0).all()
    assert {n: a.dtype for n, a in found.items()} == {n: np.asarray(a).dtype for n, a in given.items()}


def test_prompts_of_any_length_and_rows_without_one():
    student, given = build(STUDENT), batch()
    starts = np.asarray([2, 4, 8, LENGTH])  # the last row has no target that counts
    given["mask"] = np.arange(LENGTH) >= starts[:, None]
    found = OnPolicy(fraction=1.0, n_new=5, end_token=None).answered(student, given, jax.random.key(0))
    long = OnPolicy(fraction=1.0, n_new=8, end_token=None).answered(student, given, jax.random.key(0))
    assert long["mask"].any(1).tolist() == [True, True, False, False]  # no room for 8 behind 9 tokens of 16
    for row, start in enumerate(starts[:3]):
        np.testing.assert_array_equal(found["tokens"][row, : start + 1], given["tokens"][row, : start + 1])
        np.testing.assert_array_equal(np.flatnonzero(found["mask"][row]), np.arange(start, start + 5))
    assert not found["mask"][3].any()


def test_an_answer_ends_with_the_end_token_and_counts_it():
    student, given = build(STUDENT), batch(prompt=PROMPT - 1)
    options = OnPolicy(fraction=1.0, n_new=N_NEW, end_token=None)
    drawn = np.asarray(options.answered(student, given, jax.random.key(1))["tokens"])
    end = int(drawn[0, PROMPT + 2])
    found = replace(options, end_token=end).answered(student, given, jax.random.key(1))
    first = next(i for i in range(N_NEW) if drawn[0, PROMPT + i] == end)
    counted = np.flatnonzero(found["mask"][0])
    np.testing.assert_array_equal(counted, np.arange(PROMPT - 1, PROMPT + first))
    assert found["targets"][0, counted[-1]] == end
    assert (found["segments"][0, PROMPT + first + 1 :] == 0).all()


def test_some_steps_and_not_others_take_answers():
    student, teacher, given = build(STUDENT), build(STUDENT, 7), batch(prompt=PROMPT - 1)
    plain = loss_of(Distill(), student, teacher, given=given)[0]
    how = Distill(on_policy=OnPolicy(fraction=0.5, n_new=N_NEW))
    compiled = jax.jit(lambda key: loss_of_key(how, student, teacher, given, key))
    same = np.isclose([compiled(jax.random.key(i)) for i in range(24)], plain, rtol=1e-5)
    assert 5 <= same.sum() <= 19


def loss_of_key(how, student, teacher, given, key):
    return FromTeacher(how=how, teacher=teacher_of_seed()).at(teacher, jnp.float32(0))(student, given, key)[0]


def test_no_gradient_goes_through_the_drawing():
    """The loss of answers has the gradient that it has for the same rows given as data, also behind a condition."""
    student, teacher, given = build(STUDENT), build(STUDENT, 7), batch(prompt=PROMPT - 1)
    options, key = OnPolicy(fraction=0.999, n_new=N_NEW), jax.random.key(2)
    answered, drawn = options(student, given, jax.random.split(key)[0])
    assert drawn
    graph, state = nnx.split(student)

    def loss(state, how, rows):
        return loss_of_key(how, nnx.merge(graph, state), teacher, rows, key)

    through = jax.jit(jax.grad(loss), static_argnums=1)(state, Distill(on_policy=options), given)
    fixed = jax.grad(loss)(state, Distill(), answered)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), through, fixed)
    assert max(jnp.abs(a).max() for a in jax.tree.leaves(fixed)) > 0


def test_rows_that_are_too_short_are_refused():
    with pytest.raises(ConfigError, match="lower n_new or lengthen the rows"):
        OnPolicy(fraction=1.0, n_new=LENGTH).answered(build(STUDENT), batch(), jax.random.key(0))
    with pytest.raises(ConfigError, match=r"on_policy\.fraction is 0"):
        OnPolicy(fraction=0.0)


def test_text_without_answers_needs_a_prompt_and_the_end_of_its_corpus(tmp_path):
    corpus = write_corpus(tmp_path)
    end = corpus.end_of_text_id
    OnPolicy(prompt=4, end_token=end).check_text(corpus.path)
    OnPolicy(prompt=4, end_token=None).check_text(corpus.path)
    with pytest.raises(ConfigError, match=r"has no prompts; set distill\.on-policy\.prompt"):
        OnPolicy(end_token=end).check_text(corpus.path)
    with pytest.raises(ConfigError, match=rf"is not the end of text of \S+; set it to {end}, or None"):
        OnPolicy(prompt=4, end_token=end + 1).check_text(corpus.path)
