"""Objectives: functions from a model and a batch to the loss that training minimises.

An objective returns sums and counts, never means, so that padding, accumulation and sharding change nothing: the step
divides once, by the global count. What the sums over a micro-batch cannot express, an objective computes from the
``Whole`` of its batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import in_float
from efftrain.ops.cross_entropy import cross_entropy
from efftrain.ops.divergence import distillation_loss
from efftrain.ops.platform import conditional
from efftrain.sharding.rules import shard_count

# Arrays by name, of JAX or, outside of jit, of NumPy; a micro-batch also has the entry WHOLE.
Batch = Mapping[str, Any]
WHOLE = "whole"  # the entry of a micro-batch that holds the ``Whole`` to which it belongs
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count)
AUXILIARY = "loss/auxiliary"  # name of the metric for the model's auxiliary loss
Weighting = Literal["depth", "equal"]
Objective = Callable[[Decoder, Batch, Array | None], tuple[Array, Array, Metrics]]


def next_token_loss(model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
    """Cross entropy of the next token.

    Args:
      model: the decoder.
      batch: ``tokens``, ``targets``, ``segments``, ``positions``: (batch, length) int32; ``mask``: (batch, length)
        bool, False where the target does not count.
      key: random key for the model's draws in training. None: the model draws nothing, as in evaluation.

    Returns:
      The sum of nats, () float32, including the model's ``auxiliary`` loss for each target; the number of targets, ()
      float32; and metrics, of which ``loss`` is the cross entropy alone.
    """
    hidden_btd, metrics = model.hidden(
        batch["tokens"], segments_bt=batch["segments"], positions_bt=batch["positions"], key=key
    )
    loss = _cross_entropy(model, hidden_btd, batch)
    count = n_targets(batch)
    extra, metrics = auxiliary_loss(metrics, batch)
    return loss + extra, count, {"loss": (loss, count)} | metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Whole:
    """What the micro-batches of a step share, for counts and draws that must not depend on how the step is split.

    Attributes:
      batch: all rows of the step.
      key: random key of the step; each micro-batch has its own key beside it.
    """

    batch: Batch
    key: Array | None


def whole_of(batch: Batch, key: Array | None) -> Whole:
    """Returns the whole batch and key of the step; the given ones if the batch is not a micro-batch."""
    return batch.get(WHOLE) or Whole(batch, key)


def n_targets(batch: Batch) -> Array:
    """Number of targets that count, () float32."""
    return batch["mask"].sum(dtype=jnp.float32)


def auxiliary_loss(
    metrics: Metrics, batch: Batch, count: Callable[[Batch], Array] = n_targets
) -> tuple[Array | float, Metrics]:
    """Separates the loss that a model adds itself (for its routers, say) from its other metrics.

    A model's ``auxiliary`` metric is a mean over the tokens that it read. A micro-batch is weighted by its share of the
    tokens of the whole batch, so that means over tokens equal those of the whole batch, however it is split.

    Args:
      metrics: metrics of the model.
      batch: the batch that the model read.
      count: function from a batch to the number of targets, () float32, by which the loss is divided.

    Returns:
      The auxiliary loss as a sum over targets (0 if the model has none), and the other metrics, with the auxiliary loss
      under the name ``AUXILIARY``.
    """
    others: dict[str, Any] = dict(metrics)  # ``auxiliary`` is no pair
    if "auxiliary" not in others:
        return 0.0, others
    if WHOLE in batch:
        whole = batch[WHOLE].batch
        weight = count(whole) * (_n_tokens(batch) / jnp.maximum(_n_tokens(whole), 1.0))
    else:
        weight = count(batch)
    extra = others.pop("auxiliary") * weight
    return extra, others | {AUXILIARY: (extra, weight)}


def _n_tokens(batch: Batch) -> Array:
    return (batch["segments"] != 0).sum(dtype=jnp.float32)


@dataclass(frozen=True, kw_only=True)
class SelfDistillation:
    """``next_token_loss`` of a model in quantisation-aware training, plus its divergence from itself in float.

    Attributes:
      weight: weight of the divergence; the cross entropy has weight 1.
    """

    weight: float = 1.0

    def __post_init__(self):
        if not self.weight > 0:
            raise ConfigError(f"distillation.weight is {self.weight}; give a positive number, or no distillation")

    def __call__(self, model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        """As ``next_token_loss``, with the additional metric ``loss/divergence``.

        Raises:
          ConfigError: the model has no quantisation rules for its matrices.
        """
        if key is None:
            return next_token_loss(model, batch, key)
        if not model.config.quantization.rules:
            raise ConfigError(
                "distillation from the float model needs model.quantization.rules; set them, or remove distillation"
            )
        inputs = {"segments_bt": batch["segments"], "positions_bt": batch["positions"], "key": key}
        teacher = in_float(model)
        teacher_btd = teacher.hidden(batch["tokens"], **inputs)[0]
        hidden_btd, metrics = model.hidden(batch["tokens"], **inputs)
        mixed, loss, divergence = distillation_loss(
            hidden_btd,
            model.vocabulary_head(),
            batch["targets"],
            batch["mask"],
            teacher_btd,
            teacher.vocabulary_head(),
            alpha=self.weight / (1 + self.weight),
            shards=shard_count("batch", "length"),
        )
        count = n_targets(batch)
        extra, metrics = auxiliary_loss(metrics, batch)
        figures = {"loss": (loss, count), "loss/divergence": (divergence, count)}
        return (1 + self.weight) * mixed + extra, count, figures | metrics


@dataclass(frozen=True, kw_only=True)
class EarlyExitLoss:
    """``next_token_loss``, plus the loss of earlier layers through the norm and head that all layers share.

    In a small model the head costs as much as a layer or more, so each step computes only a few exits: layers that are
    ``every`` apart, with another first one in each step. All micro-batches of a step have the same exits, at the same
    tokens of their rows.

    Attributes:
      scale: weight of the earlier exits; 0.1 to 0.2 in pre-training, 1 for a small task.
      weighting: how the weight depends on the depth of the exit, see ``exit_weights``.
      every: distance in layers between the exits of a step. None: one exit per step.
      after: number of steps of the run before the first exit; needs a model with layer dropout, which counts them.
        Exits that begin when the model has learnt most cost it less.
      stride: the exits see one token out of this many, with another first one in each step. 1: all tokens.
      order: how the first exit of a step is chosen: drawn ("random"), or moved by one layer per step ("rotating", which
        needs a model with layer dropout).

    Source: Elhoushi et al. 2024 (LayerSkip), section 4.2.
    """

    scale: float = 0.2
    weighting: Weighting = "depth"
    every: int | None = None
    after: int = 0
    stride: int = 1
    order: Literal["random", "rotating"] = "random"

    def __post_init__(self):
        if not self.scale > 0:
            raise ConfigError(f"exits.scale is {self.scale}; give a positive number, or train with next_token_loss")
        if self.weighting not in get_args(Weighting):
            raise ConfigError(f"exits.weighting is {self.weighting!r}; use 'depth' or 'equal'")
        if self.every is not None and self.every < 1:
            raise ConfigError(f"exits.every is {self.every}; give at least 1, or None")
        if self.after < 0:
            raise ConfigError(f"exits.after is {self.after}; it must not be negative")
        if self.stride < 1:
            raise ConfigError(f"exits.stride is {self.stride}; give 1 for all tokens, or more for fewer")
        if self.order not in ("random", "rotating"):
            raise ConfigError(f"exits.order is {self.order!r}; use 'random' or 'rotating'")

    def n_exits(self, n_layers: int) -> int:
        """Number of exits per step, without the last layer."""
        if n_layers < 2:
            raise ConfigError("the model has one layer and no earlier exit; train it with next_token_loss")
        return -(-(n_layers - 1) // (self.every or n_layers - 1))

    def heads(self, n_layers: int, steps: int) -> float:
        """Mean number of head evaluations per token that the exits add in a run of ``steps`` steps: their cost."""
        return self.n_exits(n_layers) / self.stride * max(1 - self.after / steps, 0.0)

    def __call__(self, model: Decoder, batch: Batch, key: Array | None) -> tuple[Array, Array, Metrics]:
        """As ``next_token_loss``; ``loss`` is that of the last layer, ``loss/exits`` the mean of the step's exits.

        Raises:
          ConfigError: the model has one layer, or the stride does not divide the length of the rows.
        """
        if key is None:
            return next_token_loss(model, batch, key)
        n = model.config.n_layers
        whole = whole_of(batch, key)
        assert whole.key is not None  # a micro-batch with a key is part of a batch with one
        exit_key, token_key, _ = jax.random.split(whole.key, 3)
        key = jax.random.split(key, 3)[2]
        exits_e = self._exits(model, exit_key)
        x_btd, exit_ebtd, metrics = model.states(
            batch["tokens"],
            segments_bt=batch["segments"],
            positions_bt=batch["positions"],
            key=key,
            exits_e=exits_e,
        )
        assert exit_ebtd is not None  # asked for with exits_e
        count = n_targets(batch)
        loss = _cross_entropy(model, model.normalised(x_btd), batch)
        some = partial(_every, stride=self.stride, first=jax.random.randint(token_key, (), 0, self.stride))
        part = {name: some(batch[name]) for name in ("targets", "mask")}
        # Counted over the whole batch, because a micro-batch may have no target at these tokens.
        n_seen = some(whole.batch["mask"]).sum(dtype=jnp.float32)
        share = n_seen / jnp.maximum(n_targets(whole.batch), 1.0)

        def losses_of(exit_ebtd: Array) -> Array:
            return jnp.stack([_cross_entropy(model, model.normalised(some(x)), part) for x in exit_ebtd])

        there_e = exits_e < n - 1  # the last exit of a step may be beyond the last layer
        if self.after:
            started = self._steps(model, "after") >= self.after
            exit_losses = conditional(started, losses_of, lambda x: jnp.zeros(len(x)), exit_ebtd)
            there_e &= started
        else:
            exit_losses = losses_of(exit_ebtd)
        weights_l = exit_weights(n, self.scale, self.weighting)
        weights_e = jnp.where(there_e, weights_l[jnp.minimum(exits_e, n - 1)], 0)
        exits = (exit_losses * weights_e).sum() / jnp.maximum(share, 1e-9)
        total = (loss * weights_l[-1] + exits) / (weights_l[-1] + weights_e.sum())
        figures = {
            "loss": (loss, count),
            "loss/exits": ((exit_losses * there_e).sum(), n_targets(part) * there_e.sum()),
        }
        extra, metrics = auxiliary_loss(metrics, batch)
        return total + extra, count, figures | metrics

    def _exits(self, model: Decoder, key: Array) -> Array:
        """(e,) int32 indices of the step's exit layers; those from the last layer on do not count."""
        n = model.config.n_layers
        count, every = self.n_exits(n), self.every or n - 1
        if self.order == "random":
            first = jax.random.randint(key, (), 0, every)
        else:
            first = self._steps(model, "order 'rotating'") % every
        return first + every * jnp.arange(count)

    def _steps(self, model: Decoder, who: str) -> Array:
        if not hasattr(model, "steps"):
            raise ConfigError(
                f"exits.{who} needs the count of steps, which a model with layer dropout keeps; set "
                "model.layer_dropout.rate"
            )
        return model.steps[...]


def _every(a: Array, stride: int, first: Array) -> Array:
    """(batch, length, ...) -> (batch, length / stride, ...): one token out of ``stride``. Needs no communication."""
    batch, length = a.shape[:2]
    if length % stride:
        raise ConfigError(
            f"exits.stride is {stride}, which does not divide the {length} tokens of a row; use a divisor"
        )
    return jnp.take(a.reshape(batch, length // stride, stride, *a.shape[2:]), first, axis=2)


def exit_weights(n_layers: int, scale: float, weighting: Weighting = "depth") -> Array:
    """(layers,) weights of the loss after each layer, before those of a step are normalised.

    Args:
      n_layers: number of layers.
      scale: weight of the earlier exits.
      weighting: "depth": deeper exits weigh more, in proportion to the sum of the layer numbers up to them; the last
        layer weighs most, and the first next to nothing. "equal": every exit weighs ``scale`` times the last layer,
        for drafts by the first layers.

    Source: Elhoushi et al. 2024 (LayerSkip), equation 4, except that layers are numbered from 1: in a small model the
    first layer may draft alone, and would otherwise have no exit.
    """
    if weighting == "equal":
        return jnp.full(n_layers, scale).at[-1].set(1.0)
    number = jnp.arange(1, n_layers + 1, dtype=jnp.float32)
    sums = scale * number * (number + 1) / 2
    return sums.at[-1].set(n_layers + (sums[-2] if n_layers > 1 else 0.0))


def _cross_entropy(model: Decoder, hidden_btd: Array, batch: Batch) -> Array:
    return cross_entropy(
        hidden_btd, model.vocabulary_head(), batch["targets"], batch["mask"], shards=shard_count("batch", "length")
    )
