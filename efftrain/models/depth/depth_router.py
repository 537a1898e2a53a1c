"""The router of a depth policy: scores of tokens, the choice of the best, and its prediction from a token alone."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.linear import Linear
from efftrain.ops.norm import rms_norm
from efftrain.ops.routing import router_logits

Causal = Literal["predictor", "auxiliary", "none"]


@dataclass(frozen=True)
class ChosenTokens:
    """Tokens of each row that pass a round.

    Attributes:
      indices_bn: (batch, n) indices in the row, ascending.
      valid_bn: (batch, n) bool, False for an entry that is only there to fill the shape.
      gates_bn: (batch, n) gates.
    """

    indices_bn: Array
    valid_bn: Array
    gates_bn: Array


class Router(nnx.Module):
    """Scores tokens, and predicts which of them the choice by score will take."""

    def __init__(self, d_model: int, causal: Causal, *, token_fraction: float, eps: float, rngs: nnx.Rngs):
        self.causal, self.eps = causal, eps

        # float32: nearly equal scores must have the same order as in training.
        def linear(d_in: int, d_out: int, axes: tuple, gain: float = 1.0) -> Linear:
            made = Linear(d_in, d_out, axes=axes, dtype="float32", rngs=rngs, gain=gain)
            made.kernel.set_metadata(passes=token_fraction, quantizable=False)
            return made

        self.score = linear(d_model, 1, ("embed", None), gain=0.2)
        if causal == "predictor":
            self.into = linear(d_model, d_model // 4, ("embed", None))
            self.out = linear(d_model // 4, 1, (None, None))

    def __call__(self, x_btd: Array) -> Array:
        """Returns scores (batch, length) float32."""
        return router_logits(self._normed(x_btd), self.score.kernel[...])[..., 0]

    def predict(self, x_btd: Array) -> Array:
        """Returns (batch, length) float32 logits of being chosen, predicted from each token alone.

        Raises:
          ConfigError: the model has no predictor.
        """
        if self.causal == "none":
            raise ConfigError(
                "depth.causal is 'none', so that this model cannot choose tokens without looking ahead, as decoding "
                "must; train it with causal 'predictor'"
            )
        if self.causal == "auxiliary":
            return self(x_btd)
        x_btd = jax.lax.stop_gradient(self._normed(x_btd))
        hidden = jax.nn.silu(router_logits(x_btd, self.into.kernel[...]))
        return router_logits(hidden, self.out.kernel[...])[..., 0]

    def _normed(self, x_btd: Array) -> Array:
        return rms_norm(x_btd.astype(jnp.float32), jnp.ones(()), self.eps)


def best(scores_bt: Array, n: int) -> ChosenTokens:
    """Chooses the n tokens of each row with the highest scores, in row order; -inf marks an invalid token."""
    indices_bn = jnp.sort(jax.lax.top_k(scores_bt, n)[1], axis=-1)
    scores_bn = jnp.take_along_axis(scores_bt, indices_bn, axis=1)
    valid_bn = scores_bn > -jnp.inf
    return ChosenTokens(indices_bn, valid_bn, _gate(jnp.where(valid_bn, scores_bn, 0)))


def first(wanted_bt: Array, scores_bt: Array, n: int) -> ChosenTokens:
    """Chooses the first n wanted tokens of each row; if there are fewer, the remaining entries are invalid."""
    indices_bn = jnp.argsort(~wanted_bt, axis=1, stable=True)[:, :n]
    valid_bn = jnp.take_along_axis(wanted_bt, indices_bn, axis=1)
    return ChosenTokens(indices_bn, valid_bn, _gate(jnp.take_along_axis(scores_bt, indices_bn, axis=1)))


def causal_metrics(logits_bt: Array, chosen_bt: Array, valid_bt: Array, weight: float) -> dict:
    """Loss of predicting the choice from each token alone, and how often the prediction is right; over valid tokens."""
    n = jnp.maximum(valid_bt.sum(dtype=jnp.float32), 1.0)
    target_bt = chosen_bt & valid_bt
    nll_bt = jax.nn.softplus(jnp.where(target_bt, -logits_bt, logits_bt))
    right_bt = ((logits_bt > 0) == target_bt) & valid_bt

    def share(mask_bt: Array) -> tuple[Array, Array]:
        return mask_bt.sum(dtype=jnp.float32), n

    return {
        "auxiliary": weight * jnp.where(valid_bt, nll_bt, 0).sum() / n,
        "depth/predicted_right": share(right_bt),
        "depth/predicted": share((logits_bt > 0) & valid_bt),
    }


def _gate(scores: Array) -> Array:
    return 2 * jax.nn.sigmoid(scores)


def mark(indices_bn: Array, length: int) -> Array:
    return jax.vmap(lambda indices: jnp.zeros(length, bool).at[indices].set(True))(indices_bn)
