"""Self-speculative decoding: the first layers of a model draft, all layers verify; the same output in less time.

The output equals that of all layers to the token in float32; in bfloat16, verifying several tokens at once rounds
differently from computing one token.

A round drafts some tokens, one after the other, through the first layers and the shared head. The states after these
layers are kept, so that verification is one pass of the remaining layers over all drafted tokens, and drafting and
verification share one cache. Rejected tokens need no clean-up: the length of a row says which slots of its cache are
valid, and later slots are written before they are seen.

Source: Elhoushi et al. 2024 (LayerSkip), section 4.3; rejection sampling of Leviathan et al. 2023. The rows of a batch
accept independently, and each has its own length.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import Cache
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, extend_layers
from efftrain.models.decoding.sampling import Sampling, probabilities, sample
from efftrain.models.depth.early_exit import check_exit, check_layers


@dataclass(frozen=True, kw_only=True)
class SelfSpeculation:
    """How a model drafts for itself; ``efftrain calibrate-depth RUN`` measures the best values.

    Attributes:
      exit_layer: number of first layers that draft; fewer than the model has.
      n_draft: number of tokens per draft.
    """

    exit_layer: int
    n_draft: int = 4

    def __post_init__(self):
        if self.n_draft < 1:
            raise ConfigError(f"speculation.n_draft is {self.n_draft}; it must be at least 1")

    def check(self, config: ModelConfig) -> None:
        """Raises ``ConfigError`` if a model of this configuration cannot draft in this way."""
        check_exit("speculation.exit_layer", self.exit_layer, config.n_layers)
        check_layers(config, "self-speculation")
        for i, block in enumerate(config.layers):
            if not block.mlp.independent_tokens:
                raise ConfigError(
                    f"layer {i} may drop a token because of others, so that drafts would change the output; use a "
                    "dispatch that drops none (moe.dispatch 'auto', moe.exchange_factor None), or no self-speculation"
                )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculated:
    """New tokens, with figures about the drafts.

    Attributes:
      tokens_bn: (batch, n_new) int32.
      rounds: () int32, number of verifications of the whole batch.
      drafted_b: (batch,) int32, number of tokens drafted for each row while it was not finished.
      accepted_b: (batch,) int32, number of drafted tokens that were accepted.
    """

    tokens_bn: Array
    rounds: Array
    drafted_b: Array
    accepted_b: Array


def extra_slots(speculation: SelfSpeculation) -> int:
    """Number of cache slots that drafts need in addition to those of prompt and new tokens."""
    return speculation.n_draft


@partial(jax.jit, static_argnums=(0, 5, 6, 7))
def speculate(
    graph: nnx.GraphDef,
    state: nnx.State,
    first_b: Array,
    cache: Cache,
    key: Array,
    n_new: int,
    sampling: Sampling,
    speculation: SelfSpeculation,
    ends_e: Array | None = None,
) -> Speculated:
    """Continues rows whose prompts are in the cache and whose first new token is sampled.

    Args:
      graph, state: the split model.
      first_b: (batch,) int32, the first new token, which is not in the cache yet.
      cache: with n_new + ``extra_slots`` free slots.
      key, n_new, sampling: as in ``generate``.
      speculation: how to draft.
      ends_e: (ends,) tokens of which each ends a row. None: no token does.
    """
    model = nnx.merge(graph, state)
    layers, e, k = model.layers(), speculation.exit_layer, speculation.n_draft
    batch = len(first_b)

    def one_round(carry: tuple) -> tuple:
        i, n_b, done_b, token_b, cache, out_bn, drafted_b, accepted_b = carry
        draft_key, accept_key = jax.random.split(jax.random.fold_in(key, i))
        drafts_bk, q_bkv, states_bkd, early = _draft(model, layers[:e], token_b, cache, k, sampling, draft_key)
        positions_bk = cache.lengths_b[:, None] + jnp.arange(k + 1)
        tokens_bk = jnp.concatenate([token_b[:, None], drafts_bk], axis=1)
        x_bkd, late = extend_layers(layers[e:], states_bkd, positions_bk, cache.layers[e:], tokens_bt=tokens_bk)
        new_bk, n_accepted_b = accept(model.exit_logits(x_bkd), drafts_bk, q_bkv, sampling, accept_key)

        n_new_b = jnp.where(done_b, 0, n_accepted_b + 1)
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))
        out_bn = jnp.where(done_b[:, None], out_bn, put(out_bn, new_bk, n_b))
        n_b += n_new_b
        last_b = jnp.take_along_axis(new_bk, n_accepted_b[:, None], axis=1)[:, 0]
        stops_b = (ended(new_bk, ends_e) & (jnp.arange(k + 1) < n_new_b[:, None])).any(1)
        return (
            i + 1,
            n_b,
            done_b | stops_b | (n_b >= n_new),
            jnp.where(done_b, token_b, last_b),
            Cache((*early, *late), cache.lengths_b + n_new_b),
            out_bn,
            drafted_b + jnp.where(done_b, 0, k),
            accepted_b + jnp.where(done_b, 0, n_accepted_b),
        )

    zeros_b = jnp.zeros(batch, jnp.int32)
    out_bn = jnp.zeros((batch, n_new + k + 1), jnp.int32).at[:, 0].set(first_b)
    done_b = ended(first_b, ends_e) | (n_new <= 1)
    carry = (jnp.int32(1), zeros_b + 1, done_b, first_b, cache, out_bn, zeros_b, zeros_b)
    i, _, _, _, _, out_bn, drafted_b, accepted_b = jax.lax.while_loop(lambda c: ~c[2].all(), one_round, carry)
    tokens_bn = out_bn[:, :n_new]
    over_bn = ended(tokens_bn, ends_e)
    end_b1 = jnp.take_along_axis(tokens_bn, jnp.argmax(over_bn, axis=1)[:, None], axis=1)
    tokens_bn = jnp.where(jnp.cumsum(over_bn, axis=1) > 0, end_b1, tokens_bn)
    return Speculated(tokens_bn, i - 1, drafted_b, accepted_b)


def ended(tokens: Array, ends_e: Array | None) -> Array:
    """Whether each token ends its row, bool of the same shape; see ``speculate`` for ``ends_e``."""
    return jnp.zeros(tokens.shape, bool) if ends_e is None else (tokens[..., None] == ends_e).any(-1)


def _draft(
    model: Decoder, layers: list, token_b: Array, cache: Cache, k: int, sampling: Sampling, key: Array
) -> tuple[Array, Array | None, Array, tuple]:
    """Drafts k tokens after ``token_b``; returns them, their distributions, k + 1 states to verify, and the caches."""
    batch = len(token_b)

    def pass_layers(token_b: Array, j: Array | int, caches: tuple) -> tuple[Array, tuple]:
        token_b1, positions_b1 = token_b[:, None], cache.lengths_b[:, None] + j
        return extend_layers(layers, model.embed(token_b1, positions_b1), positions_b1, caches, tokens_bt=token_b1)

    def one(j: Array, carry: tuple) -> tuple:
        token_b, caches, states_bkd, drafts_bk, q_bkv = carry
        x_b1d, caches = pass_layers(token_b, j, caches)
        logits_bv = model.exit_logits(x_b1d[:, 0])
        token_b = sample(logits_bv, jax.random.fold_in(key, j), sampling)
        if q_bkv is not None:
            q_bkv = jax.lax.dynamic_update_slice(q_bkv, probabilities(logits_bv, sampling)[:, None], (0, j, 0))
        states_bkd = jax.lax.dynamic_update_slice(states_bkd, x_b1d, (0, j, 0))
        return token_b, caches, states_bkd, jax.lax.dynamic_update_slice(drafts_bk, token_b[:, None], (0, j)), q_bkv

    states_bkd = jnp.zeros((batch, k + 1, model.config.d_model), model.config.dtype)
    q_bkv = jnp.zeros((batch, k, model.config.vocab_size)) if sampling.temperature else None
    carry = (token_b, cache.layers[: len(layers)], states_bkd, jnp.zeros((batch, k), jnp.int32), q_bkv)
    token_b, caches, states_bkd, drafts_bk, q_bkv = jax.lax.fori_loop(0, k, one, carry)
    x_b1d, caches = pass_layers(token_b, k, caches)  # the last draft needs no head: verification samples its successor
    return drafts_bk, q_bkv, states_bkd.at[:, k].set(x_b1d[:, 0]), caches


def accept(
    logits_bkv: Array, drafts_bk: Array, q_bkv: Array | None, sampling: Sampling, key: Array
) -> tuple[Array, Array]:
    """Returns the tokens of a round: the longest prefix of the draft that the full model accepts, and one of its own.

    Args:
      logits_bkv: (batch, k + 1, vocab) of the full model, after the last token and after each draft.
      drafts_bk: (batch, k) int32.
      q_bkv: (batch, k, vocab) probabilities from which the drafts were sampled. None: greedy.
      sampling: at temperature 0, only the token with the highest probability is accepted. Otherwise a draft is accepted
        with probability min(1, p / q), and a rejected one is replaced by a sample from the residual of p, so that
        tokens are distributed as p.

    Returns:
      (batch, k + 1) int32, of which the first ``accepted + 1`` tokens count; and accepted, (batch,) int32.

    Source: Leviathan et al. 2023, algorithm 1.
    """
    k = drafts_bk.shape[1]
    if q_bkv is None:
        wanted_bk = jnp.argmax(logits_bkv, axis=-1).astype(jnp.int32)
        return wanted_bk, jnp.cumprod(wanted_bk[:, :k] == drafts_bk, axis=1, dtype=jnp.int32).sum(1)
    accept_key, rest_key = jax.random.split(key)
    p_bkv = probabilities(logits_bkv, sampling)

    def of_drafts(probabilities_bkv: Array) -> Array:
        return jnp.take_along_axis(probabilities_bkv, drafts_bk[..., None], axis=-1)[..., 0]

    u_bk = jax.random.uniform(accept_key, drafts_bk.shape)
    agreed_bk = u_bk * of_drafts(q_bkv) < of_drafts(p_bkv[:, :k])
    accepted_b = jnp.cumprod(agreed_bk, axis=1, dtype=jnp.int32).sum(1)
    # After the whole draft nothing was proposed: q is 0 there, so that the residual of p is p.
    q_bkv = jnp.pad(q_bkv, ((0, 0), (0, 1), (0, 0)))
    at_b = accepted_b[:, None, None]
    rest_bv = (jnp.take_along_axis(p_bkv, at_b, axis=1) - jnp.take_along_axis(q_bkv, at_b, axis=1))[:, 0]
    own_b = jax.random.categorical(rest_key, jnp.log(jnp.maximum(rest_bv, 0))).astype(jnp.int32)
    padded_bk = jnp.pad(drafts_bk, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(k + 1) == accepted_b[:, None], own_b[:, None], padded_bk), accepted_b
