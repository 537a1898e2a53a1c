"""What a student may learn from inside of its teacher: hidden states, and relations between tokens.

Both come beside the teacher's distributions, and help where a model lost many layers; else they do not.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.config import Full, ModelConfig, standard_attention
from efftrain.models.decoder import Decoder
from efftrain.models.linear import Linear
from efftrain.ops.norm import rms_norm
from efftrain.sharding.rules import constrain, shard_count
from efftrain.train.schedules import Ramp


@dataclass(frozen=True, kw_only=True)
class HiddenStates:
    """The residual stream behind layers of the student points where that behind layers of the teacher does.

    Widths that differ are joined by learned projections, which are no part of the student.

    Attributes:
      layers: of the student and of the teacher, pairs from 0. None: all of the student's, beside those at the same
        share of the depth.
      weight: in the loss.
    """

    layers: tuple[tuple[int, int], ...] | None = None
    weight: Ramp = field(default_factory=lambda: Ramp(start=1.0))

    def pairs(self, student: ModelConfig, teacher: ModelConfig) -> tuple[tuple[int, int], ...]:
        """Raises ConfigError where there are no such layers."""
        n, m = student.n_layers, teacher.n_layers
        pairs = tuple((i, -(-(i + 1) * m // n) - 1) for i in range(n)) if self.layers is None else self.layers
        for i, j in pairs:
            if not (0 <= i < n and 0 <= j < m):
                raise ConfigError(
                    f"features.layers has {(i, j)}, and student and teacher have {n} and {m} layers; count from 0"
                )
        return pairs

    def helpers(self, student: ModelConfig, teacher: ModelConfig, rngs: nnx.Rngs) -> nnx.List | None:
        """Projections from the student's width to the teacher's; None where they are equal."""
        if student.d_model == teacher.d_model:
            return None
        widths = student.d_model, teacher.d_model
        return nnx.List(
            Linear(*widths, axes=("embed", None), dtype=student.dtype, rngs=rngs) for _ in self.pairs(student, teacher)
        )

    def layers_read(self, student: ModelConfig, teacher: ModelConfig) -> tuple[list[int], list[int]]:
        """Of both: the layers behind which the stream is wanted."""
        pairs = self.pairs(student, teacher)
        return [i for i, _ in pairs], [j for _, j in pairs]

    def __call__(self, student: Decoder, teacher: Decoder, student_ebtd, teacher_ebtd, batch) -> Array:
        """() float32, 1 - cosine summed over tokens, a mean over the layers."""
        total, n = jnp.zeros(()), len(student_ebtd)
        for number, (x_btd, t_btd) in enumerate(zip(student_ebtd, teacher_ebtd, strict=True)):
            if hasattr(student, "helpers"):
                x_btd = student.helpers[number](x_btd)
            x_btd, t_btd = (rms_norm(a.astype(jnp.float32), jnp.ones(a.shape[-1]), 1e-6) for a in (x_btd, t_btd))
            total += ((1 - (x_btd * t_btd).mean(-1)) * batch["mask"]).sum() / n
        return total


@dataclass(frozen=True, kw_only=True)
class Relations:
    """How much the tokens of a row are like each other, in the queries, keys and values of one layer.

    Heads of any number and size can be compared, as the vectors are cut into equally many parts.

    Attributes:
      student_layer, teacher_layer: from 1, as a layer reads what stands behind the one before. Negative: from the end.
      heads: parts that the vectors of both are cut into.
      weight: in the loss.

    Source: Wang et al. 2021 (MiniLMv2), section 3.1; before rotary positions, as those are the same in both.
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
                    f"features.heads is {self.heads}, which does not divide the {n * attention.d_head} numbers of a "
                    f"{name} of the {whose}; use a divisor"
                )
        return layer

    def __call__(self, student: Decoder, teacher: Decoder, student_ebtd, teacher_ebtd, batch) -> Array:
        """() float32, summed over tokens, a mean over queries, keys, values and heads."""
        both = []
        for model, whose, x_ebtd in ((student, "student", student_ebtd), (teacher, "teacher", teacher_ebtd)):
            block = model.layers()[self._layer(whose, model.config)]
            h_btd = block.attention_norm(x_ebtd[0])
            products = block.attention.query, block.attention.key, block.attention.value
            both.append([product(h_btd) for product in products])
        # One row of each shard at a time: of (heads, length, length) there are many.
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
    """Builds the student with what is trained beside it and dropped when it is loaded."""
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
    """() float32, summed over tokens; the teacher's states get no gradient."""
    return features(student, teacher, student_ebtd, jax.lax.stop_gradient(teacher_ebtd), batch)
