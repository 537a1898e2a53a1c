"""Sampling: how the next token is sampled from the logits."""

import math
import operator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError

# Temperatures below which quotients of float32 logits may overflow, and above which sampling is uniform.
COLD, HOT = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is sampled.

    Attributes:
      temperature: divides the logits; 0 takes the token with the highest probability (greedy).
      top_k: sample only from the k tokens with the highest probabilities. None: from all.

    Raises:
      ConfigError: the temperature is negative, infinite or not a number, or top_k is not a whole number from 1.
    """

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"sampling.temperature is {self.temperature}; use 0 for greedy or a number above")
        try:
            whole = 1 if self.top_k is None else operator.index(self.top_k)
        except TypeError as error:
            raise ConfigError(f"sampling.top_k is {self.top_k}; it must be a whole number, or None") from error
        if whole < 1:
            raise ConfigError(f"sampling.top_k is {self.top_k}; it must be at least 1")


GREEDY = Sampling()


def sample(logits_bv: Array, key: Array, sampling: Sampling) -> Array:
    """Draws (batch,) int32 tokens from logits (batch, vocab)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    if sampling.top_k is not None and sampling.top_k < logits_bv.shape[-1]:
        logits_bk, tokens_bk = jax.lax.top_k(logits_bv, sampling.top_k)
        index_b = jax.random.categorical(key, _over(logits_bk, sampling.temperature))
        return jnp.take_along_axis(tokens_bk, index_b[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, _over(logits_bv, sampling.temperature)).astype(jnp.int32)


def probabilities(logits: Array, sampling: Sampling) -> Array:
    """(..., vocab) float32 probabilities from which ``sample`` samples at a temperature above 0."""
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        best, tokens = jax.lax.top_k(logits, sampling.top_k)
        logits = jnp.put_along_axis(jnp.full_like(logits, -jnp.inf), tokens, best, axis=-1, inplace=False)
    return jax.nn.softmax(_over(logits.astype(jnp.float32), sampling.temperature))


def _over(logits: Array, temperature: float) -> Array:
    """Logits over a temperature above 0, with a finite maximum; float32 would flush the smallest temperatures to 0."""
    if temperature < COLD:
        logits -= logits.max(-1, keepdims=True)
    return logits / min(max(temperature, float(jnp.finfo(jnp.float32).tiny)), HOT)
