"""The attention part of a block: projections, rotary positions, and the two ways to attend."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.models.cache import LayerCache
from efftrain.models.config import Attention
from efftrain.models.linear import Linear, RMSNorm
from efftrain.ops.attention import cached_attention
from efftrain.ops.attention_backends import attention, choose_backend
from efftrain.ops.rope import apply_rope, rope_angles
from efftrain.sharding.context import attend_on_mesh
from efftrain.sharding.rules import constrain, shard_count


class SelfAttention(nnx.Module):
    """Grouped-query self-attention on (batch, length, d_model)."""

    def __init__(self, config: Attention, d_model: int, *, n_layers: int, norm_eps: float, dtype: str, rngs: nnx.Rngs):
        self.config = config
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
            self.query_norm = RMSNorm(d_head, eps=norm_eps)
            self.key_norm = RMSNorm(d_head, eps=norm_eps)

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> Array:
        """Training: every token sees the earlier tokens of its segment."""
        return self._attend_fresh(x_btd, *self._project(x_btd, positions_bt), segments_bt)

    def extend(self, x_btd: Array, positions_bt: Array, cache: LayerCache, *, fresh: bool) -> tuple[Array, LayerCache]:
        """Decoding: new tokens see the cache and themselves.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens), consecutive in each row.
          cache: this layer's.
          fresh: the cache is empty, so the new tokens see only each other.
        """
        q_bthd, k_btkd, v_btkd = self._project(x_btd, positions_bt)
        cache = cache.write(k_btkd, v_btkd, positions_bt[:, 0])
        if fresh:
            return self._attend_fresh(x_btd, q_bthd, k_btkd, v_btkd, None), cache
        out = cached_attention(q_bthd, cache.k_bksd, cache.v_bksd, positions_bt, window=self.config.window)
        return self.out(out.reshape(*x_btd.shape[:2], -1)), cache

    def _project(self, x_btd: Array, positions_bt: Array) -> tuple[Array, Array, Array]:
        config = self.config

        def split(y: Array, axis: str) -> Array:
            return constrain(y.reshape(*y.shape[:2], -1, config.d_head), "batch", "length", axis, None)

        q_bthd, k_btkd = split(self.query(x_btd), "heads"), split(self.key(x_btd), "kv_heads")
        if config.qk_norm:
            q_bthd, k_btkd = self.query_norm(q_bthd), self.key_norm(k_btkd)
        cos, sin = rope_angles(positions_bt, config.d_head, config.rope_theta)
        v_btkd = split(self.value(x_btd), "kv_heads")
        return apply_rope(q_bthd, cos, sin), apply_rope(k_btkd, cos, sin), v_btkd

    def _attend_fresh(self, x_btd, q_bthd, k_btkd, v_btkd, segments_bt) -> Array:
        config = self.config
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
