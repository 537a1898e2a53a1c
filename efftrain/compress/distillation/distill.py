"""Knowledge distillation: training objectives by which a student learns a teacher's next-token distributions."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.compress.distillation.features import Features, feature_loss, with_helpers
from efftrain.compress.distillation.on_policy import OnPolicy
from efftrain.errors import ConfigError
from efftrain.measure.cost.objective_flops import forward_flops
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import routes_causally
from efftrain.ops.divergence import distillation_loss, kept_distillation_loss
from efftrain.sharding import hosts
from efftrain.sharding.rules import shard_count
from efftrain.train.config import Training
from efftrain.train.objectives.objective import Batch, Metrics, Objective, auxiliary_loss, next_token_loss
from efftrain.train.objectives.teacher import Teacher
from efftrain.train.run.directory import (
    check_model,
    checkpoint_directory,
    load_model_config,
    load_variables,
    model_config,
    read_json,
)
from efftrain.train.run.tokenizers import check_tokenizer
from efftrain.train.schedules import Ramp


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The distillation loss: what a student learns from its teacher.

    Attributes:
      alpha: weight of the teacher's distributions; the cross entropy of the text has the weight 1 - alpha.
      temperature: temperature at which both distributions are compared.
      beta: 0: forward KL, which makes the student cover all that the teacher predicts; 1: reverse KL, which makes it
        concentrate on the teacher's most probable tokens; between: generalised Jensen-Shannon divergence.
      features: loss on the teacher's hidden states or relations. None: no such loss, which is best unless layers were
        cut.
      on_policy: training on the student's own answers. None: on the text only.
    """

    alpha: Ramp = field(default_factory=lambda: Ramp(start=1.0))
    temperature: Ramp = field(default_factory=lambda: Ramp(start=1.0))
    beta: float = 0.0
    features: Features | None = None
    on_policy: OnPolicy | None = None

    def __post_init__(self):
        for value in (self.alpha.start, self.alpha.end):
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"distill.alpha is {value}; it is a share, give a number from 0 to 1")
        for value in (self.temperature.start, self.temperature.end):
            if value is not None and not value > 0:
                raise ConfigError(f"distill.temperature is {value}; give a positive number")
        if self.on_policy is not None and self.alpha != Ramp(start=1.0):
            raise ConfigError(
                "distill.alpha below 1 adds the cross entropy of the text, which on_policy answers do not have; use 1"
            )
        if not 0 <= self.beta <= 1:
            raise ConfigError(f"distill.beta is {self.beta}; give 0 for forward KL, 1 for reverse KL, or between")


@dataclass(frozen=True, kw_only=True)
class FromTeacher:
    """The objective of a student whose teacher also reads each batch.

    Attributes:
      how: the distillation loss.
      teacher: the teacher, with the vocabulary of the student; see ``check_vocabulary``.
    """

    how: Distill
    teacher: Teacher

    def at(self, teacher: Decoder | None, progress: Array) -> Objective:
        assert teacher is not None  # the model of ``self.teacher``
        return partial(self._loss, teacher, progress)

    def extra_flops(self, model: ModelConfig, training: Training) -> float:
        """FLOPs per token in addition to the student's training; see ``objective_flops``."""
        return extra_flops(self.how, model, self.teacher.config, training.length)

    def _loss(
        self, teacher: Decoder, progress: Array, model: Decoder, batch: Batch, key: Array | None
    ) -> tuple[Array, Array, Metrics]:
        """As ``next_token_loss``; the metric ``loss`` is the text's cross entropy, ``loss/teacher`` the forward KL."""
        if key is None:
            return next_token_loss(model, batch, key)
        how, configs = self.how, (model.config, teacher.config)
        if (length := batch["tokens"].shape[1]) > teacher.config.max_length:
            raise ConfigError(
                f"rows have {length} tokens and the teacher reads at most {teacher.config.max_length}; use shorter rows"
            )
        is_text = True
        if how.on_policy is not None:
            own, key = jax.random.split(key)
            batch, answered = how.on_policy(model, batch, own)
            is_text = ~answered
        student_e, teacher_e = how.features.layers_read(*configs) if how.features else ([], [])
        inputs = {"segments_bt": batch["segments"], "positions_bt": batch["positions"]}
        t_btd, t_ebtd, _ = teacher.states(batch["tokens"], exits_e=_array(teacher_e), **inputs)
        t_btd = jax.lax.stop_gradient(teacher.normalised(t_btd))
        x_btd, x_ebtd, metrics = model.states(batch["tokens"], exits_e=_array(student_e), key=key, **inputs)
        loss, nll, divergence = distillation_loss(
            model.normalised(x_btd),
            model.vocabulary_head(),
            batch["targets"],
            batch["mask"],
            t_btd,
            teacher.vocabulary_head(),
            alpha=how.alpha.at(progress),
            temperature=how.temperature.at(progress),
            beta=how.beta,
            shards=shard_count("batch", "length"),
        )
        count = batch["mask"].sum(dtype=jnp.float32)
        figures = {"loss": (nll * is_text, count * is_text), "loss/teacher": (divergence, count)}
        if how.features is not None:
            assert x_ebtd is not None  # asked for with exits_e
            assert t_ebtd is not None
            far = feature_loss(
                how.features, model, teacher, _in_order(x_ebtd, student_e), _in_order(t_ebtd, teacher_e), batch
            )
            loss += how.features.weight.at(progress) * far
            figures["loss/features"] = (far, count)
        extra, metrics = auxiliary_loss(metrics, batch)
        return loss + extra, count, figures | metrics


@dataclass(frozen=True, kw_only=True)
class FromCache:
    """The objective of a student whose batches contain cached predictions of the teacher (``efftrain teacher``).

    Attributes:
      how: the distillation loss. Only ``alpha`` may be set: a cache holds the predictions at temperature 1 for the
        text, and nothing for other temperatures, features or the student's own answers.
      tail: see ``ops.divergence.kept_divergence``.
      teacher: always None; the teacher is not loaded.
    """

    how: Distill
    tail: bool
    teacher: None = None

    def __post_init__(self):
        plain = Distill(alpha=self.how.alpha)
        for name in ("temperature", "beta", "features", "on_policy"):
            if getattr(self.how, name) != getattr(plain, name):
                raise ConfigError(
                    f"distill.{name} needs the teacher itself, but a teacher cache is given; remove one of them"
                )

    def at(self, teacher: Decoder | None, progress: Array) -> Objective:
        return partial(self._loss, progress)

    def _loss(self, progress: Array, model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        """As ``next_token_loss``, with the metric ``loss/teacher``; see ``ops.divergence.kept_divergence``."""
        if key is None:
            return next_token_loss(model, batch, key)
        hidden_btd, metrics = model.hidden(
            batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"], key=key
        )
        loss, nll, divergence = kept_distillation_loss(
            hidden_btd,
            model.vocabulary_head(),
            batch["targets"],
            batch["mask"],
            batch["teacher_ids"],
            batch["teacher_probs"],
            tail=self.tail,
            alpha=self.how.alpha.at(progress),
            shards=shard_count("batch", "length"),
        )
        count = batch["mask"].sum(dtype=jnp.float32)
        extra, metrics = auxiliary_loss(metrics, batch)
        return loss + extra, count, {"loss": (nll, count), "loss/teacher": (divergence, count)} | metrics


def distilled(
    build: Callable[[nnx.Rngs], Decoder], student: ModelConfig, how: Distill, teacher: Teacher
) -> tuple[Callable[[nnx.Rngs], Decoder], FromTeacher]:
    """Returns what ``fit`` needs to distil: the function that builds the student, and the objective.

    Args:
      build: builds the student.
      student: configuration of the student.
      how: the distillation loss.
      teacher: the teacher, for example from ``teacher_run``.

    Returns:
      A function that builds the student with the helper modules of ``how.features``, and the objective.

    Raises:
      ConfigError: the vocabularies differ, the features do not fit, or the teacher does not predict causally.
    """
    check_vocabulary(student, teacher.config)
    if not routes_causally(teacher.abstract_model()):
        raise ConfigError(
            "the teacher chooses tokens by looking ahead, so that it does not predict the next token; train one "
            "with causal 'predictor' or 'auxiliary'"
        )
    if how.features is not None:
        how.features.layers_read(student, teacher.config)
    return with_helpers(build, how.features, teacher.config), FromTeacher(how=how, teacher=teacher)


def teacher_run(run: Path, corpus: Path, *, dtype: str | None = None) -> Teacher:
    """Makes the model of a run the teacher for text of a corpus.

    With several processes, the first one reads the configuration of the run.

    Args:
      run: run directory of the teacher.
      corpus: the corpus that the student is trained on.
      dtype: see ``Teacher``.

    Raises:
      ConfigError: the run was trained with another tokenizer than that of the corpus.
      RunError: the run does not exist.
    """
    with hosts.together():
        if hosts.process_index() == 0:
            load_model_config(run)
            check_tokenizer(run, corpus)
    if hosts.process_count() == 1:  # several processes read it together when the run starts
        check_model(run)
    settings = hosts.from_first(lambda: read_json(run / "config.json"))
    places = checkpoint_directory(run, settings)
    return Teacher(config=model_config(run, settings), restore=partial(load_variables, places), dtype=dtype)


def check_vocabulary(student: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ConfigError if the vocabularies of student and teacher differ in size."""
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {student.vocab_size} and the teacher's is {teacher.vocab_size}; give the "
            "student the same size, including entries that only pad the vocabulary"
        )


def extra_flops(how: Distill, student: ModelConfig, teacher: ModelConfig, length: int) -> float:
    """FLOPs per token in addition to the student's training: the teacher's forward pass and the student's sampling."""
    own = how.on_policy.fraction * forward_flops(student, length) if how.on_policy else 0.0
    return forward_flops(teacher, length) + own


def _array(layers: list[int]) -> Array | None:
    return jnp.asarray(sorted(set(layers))) if layers else None


def _in_order(x_ebtd: Array, layers: list[int]) -> Array:
    """Puts the streams of the sorted, distinct layers of ``_array`` into the order of ``layers``, with repetitions."""
    places = sorted(set(layers))
    return jnp.stack([x_ebtd[places.index(layer)] for layer in layers])
