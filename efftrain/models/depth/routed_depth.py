"""Routed layers, which only some tokens pass, once or several times: mixture of depths, and recursion.

In training, the best tokens of a row are chosen by the scores of all its tokens: the work is the same for every row,
but the choice looks ahead. Decoding cannot look ahead, so each token is decided alone, by a predictor that learns the
choice. Both ways can be evaluated (``causally_routed``); only the second one is a language model.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.block import Layer
from efftrain.models.cache import RoutedCache
from efftrain.models.config import BlockConfig, DepthConfig, ModelConfig
from efftrain.models.depth.depth_router import Causal, ChosenTokens, Router, best, causal_metrics, first, mark
from efftrain.models.depth.routed_tokens import RoutedTokens, divisible, gated, put, take
from efftrain.models.stack import add_metrics

ModelT = TypeVar("ModelT", bound=nnx.Module)


@dataclass(frozen=True, kw_only=True)
class RoutedDepthConfig(DepthConfig):
    """Base of the configurations of mixture of depths and recursion.

    Attributes:
      causal: how decoding decides. "predictor": by a small network beside the router, which learns the choice without
        influence on the rest of the model. "auxiliary": by the router's own score, which a loss pulls towards the
        choice. "none": not at all; such a model cannot be decoded.
      causal_loss: weight of that loss. For "predictor" it only influences the gradient norm that is clipped; for
        "auxiliary" 0.01 to 0.1.
      room: number of slots for tokens that are decided alone, relative to the capacity for ``max_length`` tokens. The
        cache has this size; when it is full, further tokens of a row skip the layers, and are counted.
    """

    causal: Causal = "predictor"
    causal_loss: float = 0.01
    room: float = 1.5

    def _check(self, name: str) -> None:
        if self.causal not in ("predictor", "auxiliary", "none"):
            raise ConfigError(f"{name}.causal is {self.causal!r}; use 'predictor', 'auxiliary' or 'none'")
        if self.causal != "none" and self.causal_loss <= 0:
            raise ConfigError(f"{name}.causal_loss is {self.causal_loss}; give a positive number, or causal 'none'")
        if self.room < 1:
            raise ConfigError(f"{name}.room is {self.room}; it multiplies the capacity, give at least 1")

    def capacities(self) -> tuple[float, ...]:
        """Share of a row's tokens in each round through the layers; no share is larger than the one before."""
        raise NotImplementedError

    def layers_of_a_round(self) -> int:
        raise NotImplementedError

    def passes(self) -> tuple[float, ...]:
        return tuple(c for c in self.capacities() for _ in range(self.layers_of_a_round()))

    def build(self, block: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs) -> "RoutedDepth":
        return RoutedDepth(self, block, model, rngs=rngs)

    def expected(self, level: int, tokens: int) -> int:
        """Number of slots of a round in which ``tokens`` tokens are decided alone: ``room`` times the capacity."""
        capacity = self.capacities()[level]
        return tokens if capacity == 1 else min(tokens, math.ceil(self.room * capacity * tokens))

    def empty_cache(self, block: BlockConfig, model: ModelConfig, batch: int, slots: int) -> "RoutedCache":
        levels = range(len(self.capacities()))
        n_slots = tuple(min(slots, self.expected(level, model.max_length)) for level in levels)
        return RoutedCache(
            # One more slot, into which a token that does not pass is written when all others are taken.
            levels=tuple(
                tuple(block.attention.empty_cache(model, batch, n + 1) for _ in range(self.layers_of_a_round()))
                for n in n_slots
            ),
            slots=n_slots,
            stored_lb=jnp.zeros((len(levels), batch), jnp.int32),
            overflow_lb=jnp.zeros((len(levels), batch), jnp.int32),
        )


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(RoutedDepthConfig):
    """A block that only a share of each row's tokens passes; the residual stream of the others skips it.

    Attributes:
      capacity: that share, from 0.125 (the value of the paper) to 1. Small models bear 0.25 to 0.5. In training it is a
        share of a row including its padding, which passes only if there are too few tokens, so that a larger share of a
        short text passes.

    Source: Raposo et al. 2024. The gate is twice a sigmoid instead of the raw score, so that an untrained router leaves
    the block as it is and a trained one cannot blow it up.
    """

    capacity: float = 0.25

    def __post_init__(self):
        self._check("mixture_of_depths")
        if not 0 < self.capacity <= 1:
            raise ConfigError(
                f"mixture_of_depths.capacity is {self.capacity}; give a share of the tokens above 0 and up to 1"
            )

    def capacities(self) -> tuple[float, ...]:
        return (self.capacity,)

    def layers_of_a_round(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Recursion(RoutedDepthConfig):
    """The same layers applied several times, each time to fewer tokens: depth without parameters.

    Attributes:
      n_layers: number of different layers in a round, all of the block's configuration.
      shares: share of a row's tokens in each round. A token that leaves does not come back.

    Source: Bae et al. 2025 (Mixture-of-Recursions): expert-choice routing, keys and values for each round.
    """

    n_layers: int = 1
    shares: tuple[float, ...] = (1.0, 2 / 3, 1 / 3)

    def __post_init__(self):
        self._check("recursion")
        if self.n_layers < 1:
            raise ConfigError(f"recursion.n_layers is {self.n_layers}; it must be at least 1")
        if not self.shares or not 0 < min(self.shares) <= max(self.shares) <= 1:
            raise ConfigError(f"recursion.shares is {self.shares}; give shares of the tokens above 0 and up to 1")
        if any(later > earlier for earlier, later in itertools.pairwise(self.shares)):
            raise ConfigError(f"recursion.shares is {self.shares}; give no round a larger share than the round before")

    def capacities(self) -> tuple[float, ...]:
        return self.shares

    def layers_of_a_round(self) -> int:
        return self.n_layers


class RoutedDepth(Layer):
    """Rounds of layers with a router before each round that fewer tokens pass than the one before.

    Attributes:
      look_ahead: choose by score among all tokens of a row, as training does. False: decide each token alone.
    """

    def __init__(self, config: RoutedDepthConfig, block: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        self.config, self.max_length, self.look_ahead = config, model.max_length, True
        self.layers = nnx.List(block.residual.build(block, model, rngs=rngs) for _ in range(config.layers_of_a_round()))
        self.reads_tokens = block.mlp.reads_tokens
        capacities = config.capacities()
        for _, variable in nnx.to_flat_state(nnx.state(self.layers, nnx.Param)):
            variable.set_metadata(passes=sum(capacities))
        self.routers = nnx.Dict(
            {
                str(level): Router(model.d_model, config.causal, token_fraction=before, eps=model.norm_eps, rngs=rngs)
                for level, (before, capacity) in enumerate(itertools.pairwise((1.0, *capacities)))
                if capacity < before
            }
        )

    def __call__(
        self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None, tokens_bt: Array | None = None
    ) -> tuple[Array, dict]:
        """Computes the rounds in training and evaluation; see ``Block``."""
        if segments_bt is None:
            segments_bt = jnp.ones(x_btd.shape[:2], jnp.int32)
        # Padding after the documents of a row is in segment 0.
        tokens = self._tokens(x_btd, positions_bt, segments_bt, segments_bt != 0, tokens_bt)
        x_btd, layers_bt, metrics = self._rounds(0, tokens, length=x_btd.shape[1])
        n = tokens.valid_bt.sum(dtype=jnp.float32)
        return x_btd, metrics | {"depth/passes": (layers_bt.sum(dtype=jnp.float32), n)}

    def depths(
        self, x_btd: Array, positions_bt: Array, segments_bt: Array, tokens_bt: Array | None = None
    ) -> tuple[Array, Array]:
        """As ``__call__``, but with the number of layers that each token passes, (batch, length) int32, not metrics."""
        tokens = self._tokens(x_btd, positions_bt, segments_bt, segments_bt != 0, tokens_bt)
        return self._rounds(0, tokens, length=x_btd.shape[1])[:2]

    def _tokens(self, x_btd, positions_bt, segments_bt, valid_bt, tokens_bt: Array | None) -> RoutedTokens:
        return RoutedTokens(x_btd, positions_bt, segments_bt, valid_bt, tokens_bt if self.reads_tokens else None)

    def _rounds(self, level: int, tokens: RoutedTokens, *, length: int) -> tuple[Array, Array, dict]:
        """Computes a round and those after it; returns the stream, the layers that each token passes, and metrics."""
        if level == len(self.config.capacities()):
            return tokens.x_btd, jnp.zeros(tokens.valid_bt.shape, jnp.int32), {}
        choice, metrics = self._choose(level, tokens, length)
        inner = tokens if choice is None else take(tokens, choice)
        y_bnd, statistics = inner.x_btd, []
        for layer in self.layers:
            y_bnd, more = layer(y_bnd, inner.positions_bt, inner.segments_bt, inner.ids_bt)
            statistics.append(more.pop("statistics", {}))
            metrics = add_metrics(metrics, more)
        if any(statistics):
            metrics["statistics"] = {str(i): found for i, found in enumerate(statistics)}
        if choice is not None:
            y_bnd = gated(inner.x_btd, y_bnd, choice)
        y_bnd, layers_bn, more = self._rounds(level + 1, replace(inner, x_btd=y_bnd), length=length)
        layers_bn += inner.valid_bt * len(self.layers)
        metrics = _add(metrics, more)
        if choice is None:
            return y_bnd, layers_bn, metrics
        none_bt = jnp.zeros(tokens.valid_bt.shape, jnp.int32)
        return put(tokens.x_btd, y_bnd, choice), put(none_bt, layers_bn, choice), metrics

    def _choose(self, level: int, tokens: RoutedTokens, length: int) -> tuple[ChosenTokens | None, dict]:
        if str(level) not in self.routers:
            return None, {}
        router = self.routers[str(level)]
        scores_bt, n = router(tokens.x_btd), tokens.x_btd.shape[1]
        if not self.look_ahead:
            wanted_bt = (router.predict(tokens.x_btd) > 0) & tokens.valid_bt
            return first(wanted_bt, scores_bt, divisible(self.config.expected(level, self.max_length), n)), {}
        count = math.ceil(round(self.config.capacities()[level] * length, 6))
        choice = best(jnp.where(tokens.valid_bt, scores_bt, -jnp.inf), divisible(count, n))
        if router.causal == "none":
            return choice, {}
        chosen_bt = mark(choice.indices_bn, n)
        return choice, causal_metrics(router.predict(tokens.x_btd), chosen_bt, tokens.valid_bt, self.config.causal_loss)

    def extend(
        self,
        x_btd: Array,
        positions_bt: Array,
        cache: RoutedCache,
        *,
        fresh: bool,
        valid_bt: Array | None = None,
        tokens_bt: Array | None = None,
    ) -> tuple[Array, RoutedCache]:
        """Computes new tokens in decoding and prefill; see ``Block.extend``."""
        valid_bt = jnp.ones(x_btd.shape[:2], bool) if valid_bt is None else valid_bt
        tokens = self._tokens(x_btd, positions_bt, valid_bt.astype(jnp.int32), valid_bt, tokens_bt)
        return self._extend_rounds(0, tokens, cache, fresh)

    def _extend_rounds(
        self, level: int, tokens: RoutedTokens, cache: RoutedCache, fresh: bool
    ) -> tuple[Array, RoutedCache]:
        if level == len(cache.levels):
            return tokens.x_btd, cache
        if str(level) not in self.routers:
            return self._extend_round(level, tokens, cache, fresh)
        router, n = self.routers[str(level)], tokens.x_btd.shape[1]
        slots = cache.slots[level]
        wanted_bt, scores_bt = (router.predict(tokens.x_btd) > 0) & tokens.valid_bt, router(tokens.x_btd)
        allowed_bt = wanted_bt & (jnp.cumsum(wanted_bt, axis=1) <= slots - cache.stored_lb[level][:, None])
        overflow_b = (wanted_bt & ~allowed_bt).sum(1, dtype=jnp.int32)
        cache = replace(cache, overflow_lb=cache.overflow_lb.at[level].add(overflow_b))

        def pass_some(count: int, cache: RoutedCache) -> tuple[Array, RoutedCache]:
            choice = first(allowed_bt, scores_bt, count)
            y_bnd, cache = self._extend_round(level, take(tokens, choice), cache, fresh, choice)
            return put(tokens.x_btd, y_bnd, choice), cache

        most, few = min(n, slots), min(slots, self.config.expected(level, n))
        if not fresh or few == most:
            return pass_some(most, cache)
        # A prompt costs as much as its passing tokens; if more pass than expected, it is computed in full.
        fits = allowed_bt.sum(1).max() <= few
        return jax.lax.cond(fits, partial(pass_some, few), partial(pass_some, most), cache)

    def _extend_round(
        self, level: int, tokens: RoutedTokens, cache: RoutedCache, fresh: bool, choice: ChosenTokens | None = None
    ) -> tuple[Array, RoutedCache]:
        """Computes the layers for the tokens that pass, and the rounds after this one."""
        y_bnd, layers = self._extend_layers(tokens, cache.levels[level], cache.stored_lb[level], fresh)
        if choice is not None:
            y_bnd = gated(tokens.x_btd, y_bnd, choice)
        cache = replace(
            cache,
            levels=(*cache.levels[:level], layers, *cache.levels[level + 1 :]),
            stored_lb=cache.stored_lb.at[level].add(tokens.valid_bt.sum(1, dtype=jnp.int32)),
        )
        return self._extend_rounds(level + 1, replace(tokens, x_btd=y_bnd), cache, fresh)

    def _extend_layers(
        self, tokens: RoutedTokens, caches: tuple[Any, ...], stored_b: Array, fresh: bool
    ) -> tuple[Array, tuple[Any, ...]]:
        x_bnd, positions_bn, ids_bn = tokens.x_btd, tokens.positions_bt, tokens.ids_bt
        slots_bn = stored_b[:, None] + jnp.arange(x_bnd.shape[1])
        after, needed = [], tokens.valid_bt.any()
        for layer, cache in zip(self.layers, caches, strict=True):
            if fresh:
                x_bnd, cache = layer.prefill(x_bnd, positions_bn, cache, slots_bn, ids_bn)
            else:
                # Written outside the condition, within which XLA would copy the cache. A token that does not pass is
                # written to the next free slot, which the next token overwrites.
                cache = layer.write_cache(x_bnd, positions_bn, cache, slots_bn)

                def attend_cached(x_bnd: Array, layer=layer, cache=cache) -> Array:
                    return layer.attend_cached(x_bnd, positions_bn, cache, slots_bn, ids_bn)

                x_bnd = jax.lax.cond(needed, attend_cached, lambda x_bnd: x_bnd, x_bnd)
            after.append(cache)
        return x_bnd, tuple(after)

    def after_step(self, statistics: dict) -> dict:
        """See ``Decoder.after_step``."""
        figures: dict = {}
        for i, found in statistics.items():
            more = self.layers[int(i)].after_step(found) if found else {}
            several = len(self.layers) > 1
            named = {f"{name}/{i}" if several and pair[0].ndim else name: pair for name, pair in more.items()}
            figures = add_metrics(figures, named)
        return figures


def causally_routed(model: ModelT) -> ModelT:
    """Returns a copy of the model, of the same arrays, whose routed layers decide each token alone, as in decoding."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, RoutedDepth):
            module.look_ahead = False
    return copy


def has_routed_depth(model: nnx.Module) -> bool:
    return any(isinstance(module, RoutedDepth) for _, module in nnx.iter_modules(model))


def routes_causally(model: nnx.Module) -> bool:
    """Returns whether the model can choose tokens without looking ahead."""
    return all(module.causal != "none" for _, module in nnx.iter_modules(model) if isinstance(module, Router))


def _add(left: dict, right: dict) -> dict:
    """Adds the metrics of two rounds through the same layers, including their statistics."""
    statistics = add_statistics(left.pop("statistics", {}), right.pop("statistics", {}))
    return add_metrics(left, right) | ({"statistics": statistics} if statistics else {})


def add_statistics(left: dict, right: dict) -> dict:
    return jax.tree.map(jnp.add, left, right) if left and right else left or right
