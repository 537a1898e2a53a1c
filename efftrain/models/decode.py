"""Decoding with a cache: one jitted program for prompt and new tokens, static shapes."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import Cache, empty_cache
from efftrain.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn: temperature 0 takes the likeliest; top_k keeps the k likeliest."""

    temperature: float = 0.0
    top_k: int | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise ConfigError(f"sampling.temperature is {self.temperature}; use 0 for greedy or a number above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"sampling.top_k is {self.top_k}; it must be at least 1")


def sample(logits_bv: Array, key: Array, sampling: Sampling) -> Array:
    """Draws (batch,) int32 tokens from logits (batch, vocab)."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    if sampling.top_k is not None and sampling.top_k < logits_bv.shape[-1]:
        logits_bk, tokens_bk = jax.lax.top_k(logits_bv, sampling.top_k)
        drawn_b = jax.random.categorical(key, logits_bk / sampling.temperature)
        return jnp.take_along_axis(tokens_bk, drawn_b[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jax.random.categorical(key, logits_bv / sampling.temperature).astype(jnp.int32)


def generate(
    model: Decoder,
    prompts_bp: Array,
    prompt_lengths_b: Array,
    *,
    n_new: int,
    sampling: Sampling = Sampling(),
    key: Array | None = None,
    end_token: int | None = None,
) -> Array:
    """Continues each prompt by ``n_new`` tokens.

    Args:
      prompts_bp: (batch, longest prompt) int32, padded on the right with anything.
      prompt_lengths_b: (batch,) tokens of each prompt, at least 1.
      n_new: how many tokens to draw.
      sampling: how.
      key: needed for a temperature above 0.
      end_token: where a row has drawn it, the rest of the row repeats it, and the loop stops when all rows have.

    Returns:
      (batch, n_new) int32.

    Raises:
      ConfigError: prompt and new tokens together are longer than ``max_length``, or a temperature has no key.
    """
    if n_new < 1:
        raise ConfigError(f"n_new is {n_new}; it must be at least 1")
    longest = prompts_bp.shape[1] + n_new
    if longest > model.config.max_length:
        raise ConfigError(
            f"prompt and new tokens are {longest} together and model.max_length is {model.config.max_length}; "
            "shorten the prompt or draw fewer"
        )
    if sampling.temperature > 0 and key is None:
        raise ConfigError(
            f"sampling.temperature is {sampling.temperature}, which needs a key; pass jax.random.key(seed)"
        )
    graph, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    return _generate(graph, state, prompts_bp, prompt_lengths_b, key, n_new, sampling, end_token)


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _generate(graph, state, prompts_bp, prompt_lengths_b, key, n_new, sampling, end_token):
    model = nnx.merge(graph, state)
    batch, longest = prompts_bp.shape
    logits_bv, cache = prefill(model, prompts_bp, prompt_lengths_b, slots=longest + n_new)
    first = sample(logits_bv, jax.random.fold_in(key, 0), sampling)
    layers = model.layers()
    fill = 0 if end_token is None else end_token
    out_bn = jnp.full((batch, n_new), fill, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        i, token_b, _, _ = carry
        return (i < n_new) & (True if end_token is None else jnp.any(token_b != end_token))

    def step(carry):
        i, token_b, cache, out_bn = carry
        hidden_btd, cache = model.extend(token_b[:, None], cache, layers=layers)
        drawn = sample(model.logits(hidden_btd[:, 0]), jax.random.fold_in(key, i), sampling)
        if end_token is not None:
            drawn = jnp.where(token_b == end_token, end_token, drawn)
        out_bn = jax.lax.dynamic_update_slice(out_bn, drawn[:, None], (0, i))
        return i + 1, drawn, cache, out_bn

    return jax.lax.while_loop(unfinished, step, (1, first, cache, out_bn))[3]


def prefill(model: Decoder, prompts_bp: Array, prompt_lengths_b: Array, *, slots: int) -> tuple[Array, Cache]:
    """Reads padded prompts into a new cache.

    Returns:
      Logits (batch, vocab) behind each prompt's last token, and the cache. The slots of the padding hold what is never
      seen: a query sees slots up to its own position, and each is written before its position is reached.
    """
    hidden_bpd, cache = model.extend(prompts_bp, empty_cache(model.config, len(prompts_bp), slots), fresh=True)
    last_bd = jnp.take_along_axis(hidden_bpd, (prompt_lengths_b - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last_bd), Cache(layers=cache.layers, lengths_b=prompt_lengths_b.astype(jnp.int32))
