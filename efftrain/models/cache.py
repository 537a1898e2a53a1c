"""Keys and values of the tokens seen so far, in static shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.models.config import Attention, ModelConfig
from efftrain.ops.quantize import QuantizedArray, quantize


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """One layer: slot i holds the key and value of the token at position i, quantised where the model says so."""

    k_bksd: Array | QuantizedArray
    v_bksd: Array | QuantizedArray

    def write(self, k_btkd: Array, v_btkd: Array, positions_b: Array) -> "LayerCache":
        """Puts new tokens in the slots that start at ``positions_b`` (batch,) of each row."""

        def put(cache_bksd: Array, new_bktd: Array) -> Array:
            if len(cache_bksd) == 1:  # one plain slice update, which XLA does in place
                return jax.lax.dynamic_update_slice(cache_bksd, new_bktd, (0, 0, positions_b[0], 0))
            update = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
            return update(cache_bksd, new_bktd, positions_b)

        return self._put(put, k_btkd, v_btkd)

    def scatter(self, k_btkd: Array, v_btkd: Array, slots_bt: Array) -> "LayerCache":
        """Puts each new token in its slot (batch, new tokens); those behind the last slot are left out."""

        def put(cache_bksd: Array, new_bktd: Array) -> Array:
            return jax.vmap(lambda row, new, at: row.at[:, at].set(new, mode="drop"))(cache_bksd, new_bktd, slots_bt)

        return self._put(put, k_btkd, v_btkd)

    def _put(self, put: Callable[[Array, Array], Array], k_btkd: Array, v_btkd: Array) -> "LayerCache":
        """New tokens as they are stored; levels and scales go to the same slots."""

        def change(cache_bksd: Array | QuantizedArray, new_btkd: Array) -> Array | QuantizedArray:
            new_bktd = new_btkd.swapaxes(1, 2)
            if isinstance(cache_bksd, QuantizedArray):
                return jax.tree.map(put, cache_bksd, quantize(new_bktd, cache_bksd.format, -1))
            return put(cache_bksd, new_bktd.astype(cache_bksd.dtype))

        return LayerCache(change(self.k_bksd, k_btkd), change(self.v_bksd, v_btkd))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """All layers, each a ``LayerCache`` or what its depth policy keeps, and the tokens of each row, (batch,) int32."""

    layers: tuple[Any, ...]
    lengths_b: Array


def empty_cache(config: ModelConfig, batch: int, slots: int) -> Cache:
    """A cache with no tokens and room for ``slots`` a row, in the model's dtype."""
    return Cache(
        layers=tuple(block.depth.empty_cache(block, config, batch, slots) for block in config.layers),
        lengths_b=jnp.zeros((batch,), jnp.int32),
    )


def empty_layer_cache(attention: Attention, model: ModelConfig, batch: int, slots: int) -> LayerCache:
    """No tokens, room for ``slots`` a row, in the model's dtype or quantised."""
    empty = jnp.zeros((batch, attention.n_kv_heads, slots, attention.d_head), model.dtype)
    format = model.quantization.cache
    if format is not None:
        # Not quantised zeros: XLA would compute them while it compiles.
        stored = jax.eval_shape(lambda: quantize(empty, format, -1))
        return LayerCache(*(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stored) for _ in "kv"))
    return LayerCache(empty, jnp.zeros_like(empty))
