"""Routing of a mixture of experts: which experts a token goes to, and how evenly the tokens are spread.

Padding is not a token: functions that average over tokens take ``valid_n``, (tokens,) bool, and average over the valid
ones only. None: all are valid.
"""

from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Scores = Literal["softmax", "sigmoid"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """The experts of each token.

    Attributes:
      experts_nk: (tokens, k) int32, best first; of equal scores, the smaller index comes first.
      gates_nk: (tokens, k) float32, weights of the experts' outputs.
      probabilities_ne: (tokens, experts) float32, the scores normalised to sum 1.
    """

    experts_nk: Array
    gates_nk: Array
    probabilities_ne: Array


def router_logits(x: Array, kernel_de: Array) -> Array:
    """Logits of a router: (..., d_model) @ (d_model, choices) -> (..., choices), in float32 on every platform.

    By default accelerators multiply float32 in bfloat16 or TF32, forward and backward, so that rounding would order
    nearly equal scores.
    """
    flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.matmul(flat, kernel_de.astype(jnp.float32), precision="highest").reshape(*x.shape[:-1], -1)


def route(logits_ne: Array, bias_e: Array, *, top_k: int, scores: Scores, renormalize: bool) -> Routing:
    """Token-choice top-k routing.

    Args:
      logits_ne: (tokens, experts) float32.
      bias_e: (experts,) float32, added only for the choice of experts; the gates do not depend on it.
      top_k: number of experts per token.
      scores: "softmax" over the experts (Shazeer et al. 2017), or a "sigmoid" of each logit (DeepSeek-V3).
      renormalize: scale the gates of a token to sum to 1. With k = 1 they would all be 1, and the router never learn.

    Source: Wang et al. 2024 (the bias); DeepSeek-AI 2024, section 2.1.2.
    """
    if scores == "softmax":
        scores_ne = probabilities_ne = jax.nn.softmax(logits_ne)
    else:
        scores_ne = jax.nn.sigmoid(logits_ne)
        probabilities_ne = scores_ne / scores_ne.sum(-1, keepdims=True)
    experts_nk = jax.lax.top_k(jax.lax.stop_gradient(scores_ne) + bias_e, top_k)[1]
    # A product instead of indexing, whose gradient would be a scatter.
    chosen_nke = jax.nn.one_hot(experts_nk, scores_ne.shape[-1], dtype=scores_ne.dtype)
    gates_nk = jnp.einsum("nke,ne->nk", chosen_nke, scores_ne, precision="highest")
    if renormalize:
        gates_nk /= gates_nk.sum(-1, keepdims=True) + 1e-20
    return Routing(experts_nk.astype(jnp.int32), gates_nk, probabilities_ne)


def without_padding(routing: Routing, valid_n: Array) -> Routing:
    """Assigns padding to no expert, which is the index after the last one: it takes no row and adds no load."""
    n_experts = routing.probabilities_ne.shape[-1]
    return replace(routing, experts_nk=jnp.where(valid_n[:, None], routing.experts_nk, n_experts))


def balance_loss(loads_e: Array, probabilities_ne: Array, valid_n: Array | None = None) -> Array:
    """() float32: 1 if both tokens and probabilities are spread evenly, at most the number of experts.

    It is a product of two means over the tokens that are computed together, which are those of a micro-batch if a step
    has several, as in Switch.

    Args:
      loads_e: (experts,) number of assignments of each expert, over all devices; no gradient flows through it.
      probabilities_ne: (tokens, experts).
      valid_n: (tokens,) bool, see the module docstring.

    Source: Fedus et al. 2022 (Switch), equation 4.
    """
    shares_e = jax.lax.stop_gradient(loads_e / jnp.maximum(loads_e.sum(), 1.0))
    return len(loads_e) * jnp.sum(shares_e * _mean(probabilities_ne, valid_n))


def z_loss(logits_ne: Array, valid_n: Array | None = None) -> Array:
    """() float32: mean squared log-partition of the router, which keeps its logits small. Zoph et al. 2022, 2.2."""
    return _mean(jax.nn.logsumexp(logits_ne, axis=-1) ** 2, valid_n)


def _mean(values: Array, valid_n: Array | None) -> Array:
    """Mean over the valid tokens, the first axis; 0 if there is none."""
    if valid_n is None:
        return values.mean(0)
    there = jnp.where(valid_n.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    # The factor is exactly 1 if no token is padding.
    return there.mean(0) * (len(valid_n) / jnp.maximum(valid_n.sum(dtype=jnp.float32), 1.0))


def entropy(probabilities_ne: Array) -> Array:
    """Entropy of each token's probabilities, (tokens,) nats."""
    return -jnp.sum(probabilities_ne * jnp.log(jnp.maximum(probabilities_ne, 1e-30)), axis=-1)


def max_violation(loads_e: Array) -> Array:
    """Excess of the most loaded expert over the mean load: ``max / mean - 1``. Wang et al. 2024, equation 4.

    Args:
      loads_e: (..., experts) number of assignments of each expert.
    """
    return loads_e.max(-1) / jnp.maximum(loads_e.mean(-1), 1e-9) - 1


def balanced_bias(bias_e: Array, loads_e: Array, rate: float) -> Array:
    """Balancing bias after a step: raised for experts below the mean load, lowered for those above, in proportion.

    The published rule changes the bias by a fixed amount, by the sign of the error: small steps are slow to balance a
    new router, and large ones keep oscillating.

    Args:
      bias_e: (..., experts) float32.
      loads_e: (..., experts) number of assignments in the global batch.
      rate: change of the bias for a load that differs from the mean by the mean.

    Source: Wang et al. 2024, algorithm 1; the proportional variant from its section 4.3.
    """
    mean = loads_e.mean(-1, keepdims=True)
    return bias_e + rate * (1 - loads_e / jnp.maximum(mean, 1e-9))
