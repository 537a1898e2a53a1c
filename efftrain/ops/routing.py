"""Which experts a token goes to, and how evenly the tokens fall.

Batches have padding, which is no token: functions that average over tokens take ``valid_n``, (tokens,) bool, and leave
the others out. None: all are valid.
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
    """Attributes:
    experts_nk: (tokens, k) int32, best first; equal scores go to the smaller number.
    gates_nk: (tokens, k) float32 weights of their outputs.
    probabilities_ne: (tokens, experts) float32, sum 1: the scores, normalised.
    """

    experts_nk: Array
    gates_nk: Array
    probabilities_ne: Array


def router_logits(x: Array, kernel_de: Array) -> Array:
    """(..., d_model) @ (d_model, choices) -> (..., choices), in float32 on every platform.

    By default accelerators multiply float32 in bfloat16 or TF32, forward and backward: scores that are nearly equal
    would then be ordered by rounding.
    """
    flat = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return jnp.matmul(flat, kernel_de.astype(jnp.float32), precision="highest").reshape(*x.shape[:-1], -1)


def route(logits_ne: Array, bias_e: Array, *, top_k: int, scores: Scores, renormalize: bool) -> Routing:
    """Token-choice top-k routing.

    Args:
      logits_ne: (tokens, experts) float32.
      bias_e: (experts,) float32, added for the choice alone: the gates do not see it.
      top_k: experts of a token.
      scores: softmax over the experts (Shazeer et al. 2017), or a sigmoid each (DeepSeek-V3).
      renormalize: the gates of a token sum to 1. With k = 1 they would be 1 and the router never learn.

    Source: Wang et al. 2024 (the bias); DeepSeek-AI 2024, section 2.1.2.
    """
    if scores == "softmax":
        scores_ne = probabilities_ne = jax.nn.softmax(logits_ne)
    else:
        scores_ne = jax.nn.sigmoid(logits_ne)
        probabilities_ne = scores_ne / scores_ne.sum(-1, keepdims=True)
    experts_nk = jax.lax.top_k(jax.lax.stop_gradient(scores_ne) + bias_e, top_k)[1]
    # A product and not an index, whose gradient would be a scatter.
    chosen_nke = jax.nn.one_hot(experts_nk, scores_ne.shape[-1], dtype=scores_ne.dtype)
    gates_nk = jnp.einsum("nke,ne->nk", chosen_nke, scores_ne, precision="highest")
    if renormalize:
        gates_nk /= gates_nk.sum(-1, keepdims=True) + 1e-20
    return Routing(experts_nk.astype(jnp.int32), gates_nk, probabilities_ne)


def without_padding(routing: Routing, valid_n: Array) -> Routing:
    """The routing with padding assigned to no expert, which is the number after the last one: no row, no load."""
    n_experts = routing.probabilities_ne.shape[-1]
    return replace(routing, experts_nk=jnp.where(valid_n[:, None], routing.experts_nk, n_experts))


def balance_loss(loads_e: Array, probabilities_ne: Array, valid_n: Array | None = None) -> Array:
    """() float32, 1 where both the tokens and the probabilities are even, up to the number of experts.

    A product of two means over the tokens that are computed together: those of a micro-batch, where a step is taken in
    several, as in Switch.

    Args:
      loads_e: (experts,) assignments of each expert, over all devices; no gradient flows through them.
      probabilities_ne: (tokens, experts).
      valid_n: see above.

    Source: Fedus et al. 2022 (Switch), equation 4.
    """
    shares_e = jax.lax.stop_gradient(loads_e / jnp.maximum(loads_e.sum(), 1.0))
    return len(loads_e) * jnp.sum(shares_e * _mean(probabilities_ne, valid_n))


def z_loss(logits_ne: Array, valid_n: Array | None = None) -> Array:
    """() float32: mean squared log-partition of the router, which keeps its logits small. Zoph et al. 2022, 2.2."""
    return _mean(jax.nn.logsumexp(logits_ne, axis=-1) ** 2, valid_n)


def _mean(values: Array, valid_n: Array | None) -> Array:
    """The mean over the valid tokens, the first axis; 0 where there is none."""
    if valid_n is None:
        return values.mean(0)
    there = jnp.where(valid_n.reshape(-1, *[1] * (values.ndim - 1)), values, 0)
    # The factor is exactly 1 where no token is padding.
    return there.mean(0) * (len(valid_n) / jnp.maximum(valid_n.sum(dtype=jnp.float32), 1.0))


def entropy(probabilities_ne: Array) -> Array:
    """(tokens,) nats."""
    return -jnp.sum(probabilities_ne * jnp.log(jnp.maximum(probabilities_ne, 1e-30)), axis=-1)


def max_violation(loads_e: Array) -> Array:
    """By how much the fullest expert exceeds the mean load: ``max / mean - 1``. Wang et al. 2024, equation 4.

    Args:
      loads_e: (..., experts).
    """
    return loads_e.max(-1) / jnp.maximum(loads_e.mean(-1), 1e-9) - 1


def balanced_bias(bias_e: Array, loads_e: Array, rate: float) -> Array:
    """The bias after a step: more for experts below the mean load, less for those above, in proportion to the error.

    The published rule takes steps of one size, by the sign of the error: small ones are slow to balance a new router,
    and large ones keep swinging.

    Args:
      bias_e: (..., experts) float32.
      loads_e: (..., experts) assignments in the global batch.
      rate: change of the bias for a load that is off by the mean.

    Source: Wang et al. 2024, algorithm 1; the proportional variant from its section 4.3.
    """
    mean = loads_e.mean(-1, keepdims=True)
    return bias_e + rate * (1 - loads_e / jnp.maximum(mean, 1e-9))
