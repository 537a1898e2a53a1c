"""Distillation for one task: the loss by which a student learns a teacher's distribution over the labels.

The vocabularies of student and teacher may differ, because they only share the labels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.data.tasks.items import Item
from efftrain.data.tasks.rows import examples_per_row, fill, pack
from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.ops.cross_entropy import cross_entropy, token_nll
from efftrain.ops.divergence import generalized_jsd
from efftrain.sharding.rules import shard_count
from efftrain.train.objectives.objective import Batch, Metrics, auxiliary_loss


def label_divergence(student: Array, teacher: Array, temperature: float) -> Array:
    """``T^2 KL(teacher || student)`` between two distributions over labels, both at temperature T.

    Args:
      student, teacher: logits (..., labels); no gradient reaches the teacher's.
      temperature: T.

    Returns:
      (...) float32 nats.

    Source: Hinton et al. 2015; the factor T^2 keeps the size of the gradient independent of T.
    """
    tempered = student.astype(jnp.float32) / temperature, jax.lax.stop_gradient(teacher) / temperature
    return temperature**2 * generalized_jsd(*tempered, 0.0)


@dataclass(frozen=True, kw_only=True)
class TaskLoss:
    """The loss on the labels of questions, plus a next-token loss on their text.

    The loss of a question is ``alpha T^2 KL(teacher || model) + (1 - alpha) CE(label)``. The term of a label is 0 for
    questions without a known label. The loss of a text is ``text_weight`` times its mean nats per token.

    Attributes:
      first_label: token id of the first label; the labels have consecutive ids.
      n_labels: number of labels.
      alpha: weight of the teacher's distribution. 0: there is no teacher.
      temperature: T.
      text_weight: weight of the text.
    """

    first_label: int
    n_labels: int
    alpha: float = 0.0
    temperature: float = 2.0
    text_weight: float = 0.1

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; it is the teacher's share, give a number from 0 to 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0")
        if not self.text_weight >= 0:
            raise ConfigError(f"text_weight is {self.text_weight}; it must not be negative")

    def __call__(self, model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        """As ``objective.next_token_loss``, for the rows of ``data.tasks.rows``; the count is the number of questions.

        Raises:
          ConfigError: alpha is above 0 and the rows have no logits of a teacher.
        """
        if self.alpha and "teacher_logits" not in batch:
            raise ConfigError(
                f"alpha is {self.alpha} and the rows have no teacher's logits; label them, or set it to 0"
            )
        hidden_btd, metrics = model.hidden(
            batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"], key=key
        )
        logits_bnl = self.label_logits(model, hidden_btd, batch["answers"])
        asked_bn, known_bn = batch["answers"] >= 0, (batch["answers"] >= 0) & (batch["labels"] >= 0)
        gold = jnp.where(known_bn, token_nll(logits_bnl, jnp.maximum(batch["labels"], 0)), 0.0).sum()
        right = (known_bn & (logits_bnl.argmax(-1) == batch["labels"])).sum(dtype=jnp.float32)
        n_known, n_asked = known_bn.sum(dtype=jnp.float32), n_questions(batch)
        found = {"loss/label": (gold, n_known), "accuracy": (right, n_known)}
        loss = (1 - self.alpha) * gold
        if self.alpha:
            each_bn = label_divergence(logits_bnl, batch["teacher_logits"], self.temperature)
            divergence = jnp.where(asked_bn, each_bn, 0.0).sum()
            loss += self.alpha * divergence
            found["loss/divergence"] = (divergence / self.temperature**2, n_asked)
        if self.text_weight:
            text = cross_entropy(
                hidden_btd, model.vocabulary_head(), batch["targets"], batch["weights"],
                shards=shard_count("batch", "length"),
            )  # fmt: skip
            loss += self.text_weight * text
            found["loss/text"] = (text, batch["weights"].sum())
        extra, metrics = auxiliary_loss(metrics, batch, n_questions)
        return loss + extra, n_asked, found | metrics

    def label_logits(self, model: Decoder, hidden_btd: Array, answers_bn: Array) -> Array:
        """Logits of the labels at the positions of the answers, (batch, n, labels) float32.

        Args:
          model: the decoder.
          hidden_btd: its hidden states.
          answers_bn: position of the answer of each question; negative where a row has fewer questions.
        """
        at_bnd = jnp.take_along_axis(hidden_btd, jnp.maximum(answers_bn, 0)[..., None], axis=1)
        return model.logits(at_bnd)[..., self.first_label : self.first_label + self.n_labels]


def n_questions(batch: Batch) -> Array:
    """Number of questions in a batch, () float32."""
    return (batch["answers"] >= 0).sum(dtype=jnp.float32)


def predict(model: Decoder, loss: TaskLoss, items: Sequence[Item], *, length: int, batch_size: int = 16) -> np.ndarray:
    """Computes a model's logits over the labels of questions, for scores and as what a student learns from a teacher.

    Args:
      model: the decoder.
      loss: the task's loss, which knows the ids of the labels.
      items: questions that ask for a label.
      length: tokens of a row, in which several questions are packed.
      batch_size: number of rows that are read together.

    Returns:
      (n, labels) float32, in the order of the items.
    """
    graph, state = nnx.split(model)
    per_row = examples_per_row(items, length)
    rows = pack(items, length, per_row)
    out = np.zeros((len(items), loss.n_labels), np.float32)
    for start in range(0, len(rows), batch_size):
        numbers = rows[start : start + batch_size]
        filled = [fill([items[i] for i in row], length, per_row, loss.n_labels) for row in numbers]
        filled += [fill([], length, per_row, loss.n_labels)] * (batch_size - len(filled))  # one shape is compiled once
        names = ("tokens", "segments", "positions", "answers")
        logits_bnl = np.asarray(_logits(graph, state, {k: np.stack([r[k] for r in filled]) for k in names}, loss))
        for row, found in zip(numbers, logits_bnl, strict=False):
            out[row] = found[: len(row)]
    return out


@partial(jax.jit, static_argnums=(0, 3))
def _logits(graph: nnx.GraphDef, state: nnx.State, batch: Batch, loss: TaskLoss) -> Array:
    model = nnx.merge(graph, state)
    hidden_btd, _ = model.hidden(batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"])
    return loss.label_logits(model, hidden_btd, batch["answers"])
