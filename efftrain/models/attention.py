"""The attention part of a block: projections, positions, and attention in training and with a cache."""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import LayerCache
from efftrain.models.linear import Linear, scaled
from efftrain.ops.attention import cached_attention, causal_attention
from efftrain.ops.attention_backends import attention, choose_backend
from efftrain.ops.quantize import fake_quantize, group_size
from efftrain.sharding.context import ScoreInputs, attend_on_mesh
from efftrain.sharding.rules import constrain, shard_count

if TYPE_CHECKING:
    from efftrain.models.config import Attention, ModelConfig


class AttentionModule(nnx.Module):
    """Base class of attention modules, which ``AttentionConfig.build`` returns; a fork derives its own from it.

    In all calls ``x_btd`` is normalised, (batch, tokens, d_model), and a cache is what ``AttentionConfig.empty_cache``
    returns. A query sees the cache entries up to its own slot: slots after those of a row's tokens may hold anything,
    and are written before they are seen.
    """

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> Array:
        """Attention in training: every token sees the earlier tokens of its segment; (batch, tokens, d_model)."""
        raise NotImplementedError

    def write_cache(self, x_btd: Array, positions_bt: Array, cache: Any, slots_bt: Array | None = None) -> Any:
        """Returns the cache with new tokens added.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens).
          cache: cache of this layer.
          slots_bt: (batch, new tokens), consecutive indices of the slots in the cache; of several new tokens, those
            after the last slot are dropped. None: the slots are the positions. See ``cache.store_tokens``.
        """
        raise NotImplementedError

    def attend_cached(self, x_btd: Array, positions_bt: Array, cache: Any, slots_bt: Array | None = None) -> Array:
        """Attention of new tokens, which the cache already holds, to the cache; arguments as in ``write_cache``."""
        raise NotImplementedError

    def prefill(
        self, x_btd: Array, positions_bt: Array, cache: Any, slots_bt: Array | None = None
    ) -> tuple[Array, Any]:
        """Attention and ``write_cache`` for an empty cache: the new tokens see only each other, and are cached."""
        return self(x_btd, positions_bt), self.write_cache(x_btd, positions_bt, cache, slots_bt)


class SelfAttention(AttentionModule):
    """Grouped-query self-attention on (batch, length, d_model)."""

    def __init__(self, config: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs):
        d_model, n_layers, dtype, cache = model.d_model, model.n_layers, model.dtype, model.quantization.cache
        self.config, self.cache_format = config, cache
        if cache is not None:
            try:
                group_size(config.d_head, cache)
            except ConfigError as error:
                raise ConfigError(f"quantization.cache and attention.d_head {config.d_head}: {error}") from error
        heads, kv_heads, d_head = config.n_heads, config.n_kv_heads, config.d_head

        def into(n: int, axis: str) -> Linear:
            return Linear(
                d_model,
                n * d_head,
                axes=("embed", axis),
                units=(d_model, n),
                dtype=dtype,
                rngs=rngs,
                bias=config.qkv_bias,
            )

        self.query, self.key, self.value = (
            into(heads, "heads"),
            into(kv_heads, "kv_heads"),
            into(kv_heads, "kv_heads"),
        )
        self.out = Linear(
            heads * d_head,
            d_model,
            axes=("heads", "embed"),
            units=(heads, d_model),
            dtype=dtype,
            rngs=rngs,
            gain=(2 * n_layers) ** -0.5,
            bias=config.out_bias,
        )
        norm, eps = model.norm.of_heads(), model.norm_eps
        if config.qk_norm == "full":
            self.query_norm = norm.build(heads * d_head, eps=eps, axis="heads", units=heads)
            self.key_norm = norm.build(kv_heads * d_head, eps=eps, axis="kv_heads", units=kv_heads)
        elif config.qk_norm:
            self.query_norm = norm.build(d_head, eps=eps, axis="head_dim")
            self.key_norm = norm.build(d_head, eps=eps, axis="head_dim")
        self.position = config.position.build(config, model, rngs=rngs)
        if config.score_mod is not None:
            self.score_mod = config.score_mod.build(config, model, rngs=rngs)
        if config.sinks:
            self.sinks = nnx.Param(jnp.zeros((heads,)), axes=("heads",), units=(heads,))

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> Array:
        return self._attend_fresh(*self._project(x_btd, positions_bt), positions_bt, segments_bt)

    def prefill(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> tuple[Array, LayerCache]:
        q_bthd, k_btkd, v_btkd = self._project(x_btd, positions_bt)
        cache = cache.store(k_btkd, v_btkd, positions_bt, slots_bt, consecutive=True)
        return self._attend_fresh(q_bthd, k_btkd, v_btkd, positions_bt, None), cache

    def write_cache(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> LayerCache:
        return cache.store(*self._keys_and_values(x_btd, positions_bt), positions_bt, slots_bt)

    def attend_cached(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> Array:
        slots_bt = positions_bt if slots_bt is None else slots_bt
        q_bthd = self._queries(x_btd, positions_bt)
        mod = None
        if self.config.score_mod is not None:
            assert cache.positions_bs is not None  # ``empty_layer_cache`` gives it one for a score_mod
            modify = partial(_modify, self.score_mod, jnp.arange(self.config.n_heads))
            mod = modify, positions_bt, cache.positions_bs
        out = cached_attention(
            q_bthd,
            cache.k_bksd,
            cache.v_bksd,
            slots_bt,
            window=self.config.window,
            score_mod=mod,
            sinks_h=self.sinks[...] if self.config.sinks else None,
        )
        return self.out(out.reshape(*x_btd.shape[:2], -1))

    def _project(self, x_btd: Array, positions_bt: Array) -> tuple[Array, Array, Array]:
        return self._queries(x_btd, positions_bt), *self._keys_and_values(x_btd, positions_bt)

    def _queries(self, x_btd: Array, positions_bt: Array) -> Array:
        q_bthd = self._normalised_heads(self.query(x_btd), "heads", "query_norm")
        q_bthd = self.position.queries(q_bthd, positions_bt)
        if self.config.scale is None:
            return q_bthd
        return scaled(q_bthd, self.config.scale * self.config.d_head**0.5)  # every kernel takes d_head ** -0.5

    def _keys_and_values(self, x_btd: Array, positions_bt: Array) -> tuple[Array, Array]:
        k_btkd = self._normalised_heads(self.key(x_btd), "kv_heads", "key_norm")
        return self.position.keys(k_btkd, positions_bt), self._heads(self.value(x_btd), "kv_heads")

    def _normalised_heads(self, y: Array, axis: str, norm: str) -> Array:
        if self.config.qk_norm == "full":
            return self._heads(getattr(self, norm)(y), axis)
        y = self._heads(y, axis)
        return getattr(self, norm)(y) if self.config.qk_norm else y

    def _heads(self, y: Array, axis: str) -> Array:
        return constrain(y.reshape(*y.shape[:2], -1, self.config.d_head), "batch", "length", axis, None)

    def _attend_fresh(self, q_bthd, k_btkd, v_btkd, positions_bt: Array, segments_bt: Array | None) -> Array:
        config = self.config
        if self.cache_format is not None:  # train with the values that later tokens will find in the cache
            k_btkd, v_btkd = (fake_quantize(a, self.cache_format, -1) for a in (k_btkd, v_btkd))
        if config.score_mod is None and not config.sinks:
            length = q_bthd.shape[1] // shard_count("length")
            backend = choose_backend(config.backend, q_bthd.dtype, config.d_head, length)
            attend = partial(attention, window=config.window, backend=backend, n_blocks=config.n_blocks)
            scores = None
        else:  # the other kernels compute the scores and their softmax themselves
            backend = "xla"
            graph, state = (None, None) if config.score_mod is None else nnx.split(self.score_mod)
            attend = partial(_attend_modified, graph, window=config.window, n_blocks=config.n_blocks)
            sinks_h = self.sinks[...] if config.sinks else None
            scores = ScoreInputs(positions_bt, jnp.arange(config.n_heads), state, sinks_h)
        out_bthd = attend_on_mesh(
            attend,
            q_bthd,
            k_btkd,
            v_btkd,
            segments_bt,
            window=config.window,
            per_device=backend != "xla",
            scores=scores,
        )
        return self.out(jnp.reshape(out_bthd, (*out_bthd.shape[:2], -1)))


def _attend_modified(graph: nnx.GraphDef | None, q_bthd, k_bskd, v_bskd, *, scores: ScoreInputs, **how: Any) -> Array:
    if graph is not None:
        modify = partial(_modify, nnx.merge(graph, scores.state), scores.heads_h)
        how |= {"score_mod": modify, "positions_bs": scores.positions_bs}
    return causal_attention(q_bthd, k_bskd, v_bskd, sinks_h=scores.sinks_h, **how)


def _modify(module: nnx.Module, heads_h: Array, scores_bhts: Array, queries_bt: Array, keys_bs: Array) -> Array:
    return module(scores_bhts, heads_h, queries_bt, keys_bs)
