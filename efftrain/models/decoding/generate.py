"""Generation with a cache: one jitted program for the prompts and one for the new tokens, with static shapes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import Cache, RoutedCache, empty_cache
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.prompts import Prompts, padded
from efftrain.models.decoding.sampling import GREEDY, Sampling, sample
from efftrain.models.decoding.self_speculation import SelfSpeculation, ended, extra_slots, speculate
from efftrain.models.decoding.unrolled import unrolled
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe, advance, check_layers, extend_until_sure


@dataclass(frozen=True)
class AllLayers:
    """The depth of generation in which every new token passes every layer."""


Depth = AllLayers | SelfSpeculation | ConfidenceExit


@dataclass(frozen=True)
class Generation:
    """New tokens, with figures about how they were generated.

    Attributes:
      tokens_bn: (batch, n_new) int32.
      layers_b: (batch,) float32, mean number of layers that a new token passed, up to the end of its row and without
        the first new token, which comes from the prompt. None for self-speculation.
      acceptance_b: (batch,) float32, share of the drafts that were accepted. None without self-speculation.
      overflow_b: (batch,) int32, number of tokens for which routed layers had no free slot. None for self-speculation.
    """

    tokens_bn: Array
    layers_b: Array | None
    acceptance_b: Array | None = None
    overflow_b: Array | None = None


def generate(
    model: Decoder,
    prompts_bp: Prompts,
    prompt_lengths_b: Array | np.ndarray | None = None,
    *,
    n_new: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    end_token: int | Sequence[int] | None = None,
    depth: Depth = AllLayers(),
    max_layers_b: Array | None = None,
    probe: ExitProbe | None = None,
) -> Array:
    """Continues each prompt by ``n_new`` tokens.

    Args:
      model: a model with stacked layers is taken apart for the call, which holds its layers twice until it returns. For
        several calls, or if memory is short, do that once: ``unrolled(model, donate=True)``.
      prompts_bp: (batch, longest prompt) int32, padded on the right with any token; or a list of token ids per row.
      prompt_lengths_b: (batch,) number of tokens of each prompt, at least 1. None: the lengths of the lists, or the
        width of the array.
      n_new: number of new tokens per row.
      sampling: how a token is sampled.
      key: random key, needed for a temperature above 0.
      end_token: the token that ends a row, or several of which each does, such as ``eos`` of the tokenizer of a run.
        Once a row has sampled one of them, the rest of the row repeats it; the loop stops when all rows have. None, or
        an empty sequence: no token does.
      depth: which layers new tokens pass. ``SelfSpeculation`` samples from the same distribution as ``AllLayers``, and
        exactly the same tokens if greedy.
      max_layers_b: (batch,) int32, largest number of layers that the new tokens of each row pass, which each request
        can choose. Not for ``SelfSpeculation``, whose output is always that of all layers. None: all layers.
      probe: the probe of a ``ConfidenceExit`` with the rule "probe".

    Returns:
      (batch, n_new) int32.

    Raises:
      ConfigError: prompt and new tokens together are longer than ``max_length``, a temperature above 0 has no key, or
        the model does not support the depth.
    """
    return generate_report(
        model, prompts_bp, prompt_lengths_b, n_new=n_new, sampling=sampling, key=key, end_token=end_token, depth=depth,
        max_layers_b=max_layers_b, probe=probe,
    ).tokens_bn  # fmt: skip


def generate_report(
    model: Decoder,
    prompts_bp: Prompts,
    prompt_lengths_b: Array | np.ndarray | None = None,
    *,
    n_new: int,
    sampling: Sampling = GREEDY,
    key: Array | None = None,
    end_token: int | Sequence[int] | None = None,
    depth: Depth = AllLayers(),
    max_layers_b: Array | None = None,
    probe: ExitProbe | None = None,
) -> Generation:
    """``generate``, which also reports the depth that the new tokens took."""
    prompts_bp, prompt_lengths_b = padded(prompts_bp, prompt_lengths_b)
    ends_e = _end_tokens(end_token)
    _check(model, prompts_bp.shape[1], n_new, sampling, key)
    graph, state = nnx.split(unrolled(model))
    key = jax.random.key(0) if key is None else key
    extra = 0
    if isinstance(depth, SelfSpeculation):
        depth.check(model.config)
        if max_layers_b is not None:
            raise ConfigError(
                "max_layers_b has no effect in self-speculation, which uses all layers; set only one of them"
            )
        extra = extra_slots(depth)
    elif isinstance(depth, ConfidenceExit) or max_layers_b is not None:
        check_layers(model.config, "depth=ConfidenceExit" if isinstance(depth, ConfidenceExit) else "max_layers_b")
        max_layers_b = _checked_max_layers(max_layers_b, len(prompts_bp))
        exit_ = depth if isinstance(depth, ConfidenceExit) else ConfidenceExit(threshold=2.0, exits=())
        depth = replace(exit_, exits=exit_.exit_layers(model.config.n_layers))
    first_b, cache = read_prompts(graph, state, prompts_bp, prompt_lengths_b, key, n_new + extra, sampling)
    if isinstance(depth, SelfSpeculation):
        found = speculate(graph, state, first_b, cache, key, n_new, sampling, depth, ends_e)
        return Generation(found.tokens_bn, None, found.accepted_b / jnp.maximum(found.drafted_b, 1))
    threshold = depth.threshold if isinstance(depth, ConfidenceExit) else 0.0
    static = replace(depth, threshold=0.0) if isinstance(depth, ConfidenceExit) else depth
    tokens_bn, layers_b, overflow_b = decode_tokens(
        graph, state, first_b, cache, key, n_new, sampling, static, ends_e, threshold, max_layers_b, probe
    )
    return Generation(tokens_bn, layers_b, overflow_b=overflow_b)


def _end_tokens(end_token: int | Sequence[int] | None) -> Array | None:
    """The tokens that end a row, (ends,) int32. None: no token does."""
    ends = np.atleast_1d(np.asarray([] if end_token is None else end_token, np.int32))
    return jnp.asarray(ends) if len(ends) else None


def _checked_max_layers(max_layers_b: Array | None, batch: int) -> Array | None:
    if max_layers_b is None:
        return None
    max_layers = np.asarray(max_layers_b)
    if max_layers.shape != (batch,) or max_layers.min() < 1:
        raise ConfigError(
            f"max_layers_b is {max_layers.tolist()}; give each of the {batch} rows a number of layers, at least 1"
        )
    return jnp.asarray(max_layers, jnp.int32)


def _check(model: Decoder, prompt: int, n_new: int, sampling: Sampling, key: Array | None) -> None:
    if n_new < 1:
        raise ConfigError(f"n_new is {n_new}; it must be at least 1")
    longest = prompt + n_new
    if longest > model.config.max_length:
        raise ConfigError(
            f"prompt and new tokens are {longest} together and model.max_length is {model.config.max_length}; "
            "shorten the prompt or generate fewer"
        )
    if sampling.temperature > 0 and key is None:
        raise ConfigError(
            f"sampling.temperature is {sampling.temperature}, which needs a key; pass jax.random.key(seed)"
        )


@partial(jax.jit, static_argnums=(0, 5, 6))
def read_prompts(graph, state, prompts_bp, prompt_lengths_b, key, slots, sampling):
    """Returns the first new token of each row, and the cache of the prompts with ``slots`` more slots."""
    logits_bv, cache = prefill(nnx.merge(graph, state), prompts_bp, prompt_lengths_b, slots=prompts_bp.shape[1] + slots)
    return sample(logits_bv, jax.random.fold_in(key, 0), sampling), cache


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def decode_tokens(graph, state, first_b, cache, key, n_new, sampling, depth, ends_e, threshold, max_layers_b, probe):
    """Returns (batch, n_new) tokens, of which the first is given; mean layers of the others; tokens without a slot."""
    model = nnx.merge(graph, state)
    layers = model.layers()
    n_full = sum(block.depth.every_token for block in model.config.layers)
    out_bn = jnp.zeros((len(first_b), n_new), jnp.int32).at[:, 0].set(first_b)

    def goes_on(token_b):
        return ~ended(token_b, ends_e)

    def next_logits(token_b, cache):
        """Returns the logits, the cache, and the number of layers that the token passed."""
        if isinstance(depth, AllLayers):
            hidden_btd, after = model.extend(token_b[:, None], cache, layers=layers)
            passed_b = sum(r.passed_b() for r in _routed(after)) - sum(r.passed_b() for r in _routed(cache))
            return model.logits(hidden_btd[:, 0]), after, n_full + passed_b
        by = partial(
            advance, model, depth.exits, depth.rule, threshold=threshold, probe=probe, max_layers_b=max_layers_b
        )
        positions_bt = cache.lengths_b[:, None]
        x_btd = model.embed(token_b[:, None], positions_bt)
        ended_bt = ~goes_on(token_b)[:, None]
        found, after = extend_until_sure(
            model, layers, x_btd, positions_bt, cache.layers, by, ended_bt, tokens_bt=token_b[:, None]
        )
        return model.exit_logits(found.x_btd[:, 0]), Cache(after, cache.lengths_b + 1), found.layers_bt[:, 0]

    def unfinished(carry):
        i, token_b, *_ = carry
        return (i < n_new) & goes_on(token_b).any()

    def step(carry):
        i, token_b, cache, out_bn, layers_b, steps_b = carry
        logits_bv, cache, more_b = next_logits(token_b, cache)
        active_b = goes_on(token_b)
        sampled = sample(logits_bv, jax.random.fold_in(key, i), sampling)
        sampled = jnp.where(active_b, sampled, token_b)
        out_bn = jax.lax.dynamic_update_slice(out_bn, sampled[:, None], (0, i))
        return i + 1, sampled, cache, out_bn, layers_b + active_b * more_b, steps_b + active_b

    zeros_b = jnp.zeros(first_b.shape, jnp.int32)
    carry = (1, first_b, cache, out_bn, zeros_b, zeros_b)
    i, last_b, cache, out_bn, layers_b, steps_b = jax.lax.while_loop(unfinished, step, carry)
    out_bn = jnp.where(jnp.arange(n_new) < i, out_bn, last_b[:, None])  # all rows have ended before
    overflow_b = sum((routed.overflow_lb.sum(0) for routed in _routed(cache)), zeros_b)
    return out_bn, layers_b / jnp.maximum(steps_b, 1), overflow_b


def _routed(cache: Cache) -> list[RoutedCache]:
    return [layer for layer in cache.layers if isinstance(layer, RoutedCache)]


def prefill(model: Decoder, prompts_bp: Array, prompt_lengths_b: Array, *, slots: int) -> tuple[Array, Cache]:
    """Computes padded prompts and puts them into a new cache.

    Args:
      model: the decoder.
      prompts_bp: (batch, longest prompt) int32, padded on the right.
      prompt_lengths_b: (batch,) number of tokens of each prompt.
      slots: number of slots of the cache.

    Returns:
      Logits (batch, vocab) after each prompt's last token, and the cache. What the slots of the padding hold is never
      seen: a query sees slots up to its own position, and each slot is written before its position is reached.
    """
    empty, lengths_b = empty_cache(model.config, len(prompts_bp), slots), prompt_lengths_b.astype(jnp.int32)
    hidden_bpd, cache = model.extend(prompts_bp, empty, fresh=True, n_valid_b=lengths_b)
    last_bd = jnp.take_along_axis(hidden_bpd, (prompt_lengths_b - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last_bd), cache
