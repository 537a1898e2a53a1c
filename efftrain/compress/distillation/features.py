"""Feature distillation: a student learns its teacher's hidden states, or the relations between its tokens.

Both losses are added to that of the teacher's distributions. They help if the student has lost many layers, and
otherwise do not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.attention import SelfAttention
from efftrain.models.block import Block
from efftrain.models.config import Full, ModelConfig, standard_attention
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Linear
from efftrain.ops.norm import rms_norm
from efftrain.sharding.rules import constrain, shard_count
from efftrain.train.schedules import Ramp


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """Aligns the residual stream after layers of the student with that after layers of the teacher, by cosine distance.

    If their widths differ, learned projections map the student's stream to the teacher's width; they are not part of
    the student.

    Attributes:
      layers: pairs (layer of the student, layer of the teacher), counted from 0. None: every layer of the student, with
        the teacher's layer at the same relative depth.
      weight: weight in the loss.
    """

    layers: tuple[tuple[int, int], ...] | None = None
    weight: Ramp = field(default_factory=lambda: Ramp(start=1.0))

    def pairs(self, student: ModelConfig, teacher: ModelConfig) -> tuple[tuple[int, int], ...]:
        """The pairs of layers; raises ConfigError if the student or the teacher has no such layer."""
        n, m = student.n_layers, teacher.n_layers
        pairs = tuple((i, -(-(i + 1) * m // n) - 1) for i in range(n)) if self.layers is None else self.layers
        for i, j in pairs:
            if not (0 <= i < n and 0 <= j < m):
                raise ConfigError(
                    f"features.layers has {(i, j)}, but student and teacher have {n} and {m} layers; count from 0"
                )
        return pairs

    def helpers(self, student: ModelConfig, teacher: ModelConfig, rngs: nnx.Rngs) -> nnx.List | None:
        """Projections from the student's width to the teacher's, one per pair; None if the widths are equal."""
        if student.d_model == teacher.d_model:
            return None
        widths = student.d_model, teacher.d_model
        return nnx.List(
            Linear(*widths, axes=("embed", None), dtype=student.dtype, rngs=rngs) for _ in self.pairs(student, teacher)
        )

    def layers_read(self, student: ModelConfig, teacher: ModelConfig) -> tuple[list[int], list[int]]:
        """Indices of the layers after which the residual stream is read, for student and teacher."""
        pairs = self.pairs(student, teacher)
        return [i for i, _ in pairs], [j for _, j in pairs]

    def __call__(self, student: Decoder, teacher: Decoder, student_ebtd, teacher_ebtd, batch) -> Array:
        """() float32, ``1 - cosine``, summed over the tokens that count and averaged over the layers."""
        total, n = jnp.zeros(()), len(student_ebtd)
        for number, (x_btd, t_btd) in enumerate(zip(student_ebtd, teacher_ebtd, strict=True)):
            if hasattr(student, "helpers"):
                x_btd = student.helpers[number](x_btd)
            x_btd, t_btd = (rms_norm(a.astype(jnp.float32), jnp.ones(a.shape[-1]), 1e-6) for a in (x_btd, t_btd))
            total += ((1 - (x_btd * t_btd).mean(-1)) * batch["mask"]).sum() / n
        return total


@dataclass(frozen=True, kw_only=True)
class Relations:
    """Self-attention relations: the student's tokens of a row should resemble each other as the teacher's tokens do.

    The similarities are taken between the queries, between the keys and between the values of one layer. The numbers
    and sizes of heads may differ, because the vectors of both models are split into the same number of parts.

    Attributes:
      student_layer, teacher_layer: index of the layer, at least 1, because a layer reads the stream after the layer
        before it. Negative: counted from the end.
      heads: number of parts (relation heads) that the vectors of both models are split into.
      weight: weight in the loss.

    Source: Wang et al. 2021 (MiniLMv2), section 3.1; before rotary positions, which are the same in both models.
    """

    student_layer: int = -1
    teacher_layer: int = -1
    heads: int = 8
    weight: Ramp = field(default_factory=lambda: Ramp(start=1.0))

    def __post_init__(self):
        if self.heads < 1:
            raise ConfigError(f"features.heads is {self.heads}; give at least 1")

    def helpers(self, student: ModelConfig, teacher: ModelConfig, rngs: nnx.Rngs) -> None:
        return None

    def layers_read(self, student: ModelConfig, teacher: ModelConfig) -> tuple[list[int], list[int]]:
        return [self._layer("student", student) - 1], [self._layer("teacher", teacher) - 1]

    def _layer(self, whose: str, config: ModelConfig) -> int:
        given = getattr(self, f"{whose}_layer")
        layer = given % config.n_layers if -config.n_layers <= given < config.n_layers else 0
        if layer == 0:
            raise ConfigError(f"features.{whose}_layer is {given}; give one of 1 to {config.n_layers - 1}")
        block = config.layers[layer]
        if not isinstance(block.depth, Full):
            raise ConfigError(f"features.{whose}_layer is {given}, a layer of routed depth; choose another one")
        attention = standard_attention(block, "features.Relations")
        for name, n in (("query", attention.n_heads), ("key", attention.n_kv_heads)):
            if n * attention.d_head % self.heads:
                raise ConfigError(
                    f"features.heads is {self.heads}, which does not divide the {n * attention.d_head} features of a "
                    f"{name} of the {whose}; use a divisor"
                )
        return layer

    def __call__(self, student: Decoder, teacher: Decoder, student_ebtd, teacher_ebtd, batch) -> Array:
        """() float32, KL divergence of the relations: summed over tokens, averaged over q, k, v and relation heads."""
        both = []
        for model, whose, x_ebtd in ((student, "student", student_ebtd), (teacher, "teacher", teacher_ebtd)):
            block = model.layers()[self._layer(whose, model.config)]
            if not isinstance(block, Block) or not isinstance(block.attention, SelfAttention):
                raise ConfigError(
                    f"features.{whose}_layer is a layer without efftrain's own queries and keys; choose another one"
                )
            h_btd = block.attention_input(x_ebtd[0])
            products = block.attention.query, block.attention.key, block.attention.value
            both.append([product(h_btd) for product in products])
        # One row of each shard at a time, because the relations (heads, length, length) of all rows take much memory.
        shards = shard_count("batch")

        def apart(a: Array) -> Array:
            a = jnp.swapaxes(a.reshape(shards, -1, *a.shape[1:]), 0, 1)
            return constrain(a, None, "batch", *(None,) * (a.ndim - 2))

        rows = jax.tree.map(apart, (*both[0], *both[1], batch["segments"], batch["mask"]))
        return jax.lax.map(jax.checkpoint(jax.vmap(self._row)), rows).sum()

    def _row(self, row: tuple[Array, ...]) -> Array:
        *vectors, segments_t, mask_t = row
        causal_tt = jnp.tril(jnp.ones((len(segments_t),) * 2, bool)) & (segments_t[:, None] == segments_t[None])
        total = jnp.zeros(())
        for x_tf, t_tf in zip(vectors[:3], vectors[3:], strict=True):
            log_s, log_t = (self._relation(a, causal_tt) for a in (x_tf, t_tf))
            far_ht = jnp.where(causal_tt, jnp.exp(log_t) * (log_t - log_s), 0).sum(-1)
            total += (far_ht.mean(0) * mask_t).sum() / 3
        return total

    def _relation(self, a_tf: Array, causal_tt: Array) -> Array:
        a_thf = a_tf.astype(jnp.float32).reshape(len(a_tf), self.heads, -1)
        scores_htt = jnp.einsum("thf,shf->hts", a_thf, a_thf) / jnp.sqrt(a_thf.shape[-1])
        return jax.nn.log_softmax(jnp.where(causal_tt, scores_htt, -1e30))


Features = HiddenStates | Relations


def with_helpers(
    build: Callable[[nnx.Rngs], Decoder], features: Features | None, teacher: ModelConfig | None
) -> Callable[[nnx.Rngs], Decoder]:
    """Returns a function that builds the student with the helper modules of ``features``.

    The helpers are trained with the student and dropped when it is loaded.
    """
    if features is None or teacher is None:
        return build

    def both(rngs: nnx.Rngs) -> Decoder:
        model = build(rngs)
        helpers = features.helpers(model.config, teacher, rngs)
        if helpers is not None:
            model.helpers = helpers
        return model

    return both


def feature_loss(
    features: Features, student: Decoder, teacher: Decoder, student_ebtd: Array, teacher_ebtd: Array, batch: Mapping
) -> Array:
    """The loss of ``features``, () float32, summed over tokens; no gradient reaches the teacher's states.

    Args:
      features: the loss.
      student, teacher: the models.
      student_ebtd, teacher_ebtd: residual streams after the layers that ``layers_read`` names, in that order.
      batch: with "mask" and, for ``Relations``, "segments".
    """
    return features(student, teacher, student_ebtd, jax.lax.stop_gradient(teacher_ebtd), batch)
