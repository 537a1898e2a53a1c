"""The attention part of a block: projections, rotary positions, and the two ways to attend."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.cache import LayerCache
from efftrain.models.config import Attention
from efftrain.models.linear import Linear, RMSNorm
from efftrain.ops.attention import cached_attention
from efftrain.ops.attention_backends import attention, choose_backend
from efftrain.ops.number_formats import AnyFormat
from efftrain.ops.quantize import fake_quantize, group_size
from efftrain.ops.rope import apply_rope, rope_angles
from efftrain.sharding.context import attend_on_mesh
from efftrain.sharding.rules import constrain, shard_count


class SelfAttention(nnx.Module):
    """Grouped-query self-attention on (batch, length, d_model)."""

    def __init__(
        self,
        config: Attention,
        d_model: int,
        *,
        n_layers: int,
        norm_eps: float,
        dtype: str,
        cache: AnyFormat | None = None,
        rngs: nnx.Rngs,
    ):
        self.config, self.cache_format = config, cache
        if cache is not None:
            try:
                group_size(config.d_head, cache)
            except ConfigError as error:
                raise ConfigError(f"quantization.cache and attention.d_head {config.d_head}: {error}") from error
        heads, kv_heads, d_head = config.n_heads, config.n_kv_heads, config.d_head

        def into(n: int, axis: str) -> Linear:
            return Linear(d_model, n * d_head, axes=("embed", axis), units=(d_model, n), dtype=dtype, rngs=rngs)

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
        )
        if config.qk_norm:
            self.query_norm = RMSNorm(d_head, eps=norm_eps, axis="head_dim")
            self.key_norm = RMSNorm(d_head, eps=norm_eps, axis="head_dim")

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> Array:
        """Training: every token sees the earlier tokens of its segment."""
        return self._attend_fresh(x_btd, *self._project(x_btd, positions_bt), segments_bt)

    def read(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> tuple[Array, LayerCache]:
        """Decoding, where the cache is empty: the new tokens see each other, and the cache keeps them.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens) for the rotary embedding.
          cache: this layer's.
          slots_bt: (batch, new tokens) where they stand in the cache, consecutive. None: at their positions.
        """
        q_bthd, k_btkd, v_btkd = self._project(x_btd, positions_bt)
        cache = cache.write(k_btkd, v_btkd, (positions_bt if slots_bt is None else slots_bt)[:, 0])
        return self._attend_fresh(x_btd, q_bthd, k_btkd, v_btkd, None), cache

    def remember(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> LayerCache:
        """The cache with the keys and values of new tokens; arguments as in ``read``.

        Of several tokens with slots of their own, those behind the last slot are left out.
        """
        k_btkd, v_btkd = self._keys_and_values(x_btd, positions_bt)
        if slots_bt is not None and x_btd.shape[1] > 1:
            return cache.scatter(k_btkd, v_btkd, slots_bt)
        return cache.write(k_btkd, v_btkd, (positions_bt if slots_bt is None else slots_bt)[:, 0])

    def recall(self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None) -> Array:
        """What new tokens that the cache already has see in it; arguments as in ``read``."""
        slots_bt = positions_bt if slots_bt is None else slots_bt
        q_bthd = self._queries(x_btd, positions_bt)
        out = cached_attention(q_bthd, cache.k_bksd, cache.v_bksd, slots_bt, window=self.config.window)
        return self.out(out.reshape(*x_btd.shape[:2], -1))

    def _project(self, x_btd: Array, positions_bt: Array) -> tuple[Array, Array, Array]:
        return self._queries(x_btd, positions_bt), *self._keys_and_values(x_btd, positions_bt)

    def _queries(self, x_btd: Array, positions_bt: Array) -> Array:
        q_bthd = self._heads(self.query(x_btd), "heads")
        if self.config.qk_norm:
            q_bthd = self.query_norm(q_bthd)
        return apply_rope(q_bthd, *self._angles(positions_bt))

    def _keys_and_values(self, x_btd: Array, positions_bt: Array) -> tuple[Array, Array]:
        k_btkd = self._heads(self.key(x_btd), "kv_heads")
        if self.config.qk_norm:
            k_btkd = self.key_norm(k_btkd)
        return apply_rope(k_btkd, *self._angles(positions_bt)), self._heads(self.value(x_btd), "kv_heads")

    def _heads(self, y: Array, axis: str) -> Array:
        return constrain(y.reshape(*y.shape[:2], -1, self.config.d_head), "batch", "length", axis, None)

    def _angles(self, positions_bt: Array) -> tuple[Array, Array]:
        return rope_angles(positions_bt, self.config.d_head, self.config.rope_theta)

    def _attend_fresh(self, x_btd, q_bthd, k_btkd, v_btkd, segments_bt) -> Array:
        config = self.config
        if self.cache_format is not None:  # what later tokens will find in the cache
            k_btkd, v_btkd = (fake_quantize(a, self.cache_format, -1) for a in (k_btkd, v_btkd))
        length = q_bthd.shape[1] // shard_count("length")
        backend = choose_backend(config.backend, q_bthd.dtype, config.d_head, length)
        out_bthd = attend_on_mesh(
            partial(attention, window=config.window, backend=backend, n_blocks=config.n_blocks),
            q_bthd,
            k_btkd,
            v_btkd,
            segments_bt,
            window=config.window,
            per_device=backend != "xla",
        )
        return self.out(jnp.reshape(out_bthd, (*x_btd.shape[:2], -1)))
