"""The cache of keys and values of the tokens seen so far, in static shapes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.ops.quantize import QuantizedArray, quantize

if TYPE_CHECKING:
    from efftrain.models.config import Attention, ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, with a slot for each token, quantised if the model configuration says so.

    Attributes:
      k_bksd: keys (batch, kv_heads, slots, d_head).
      v_bksd: values, like the keys.
      positions_bs: (batch, slots) int32, positions of the keys, for attention that modifies scores by positions. None:
        for other attention.
    """

    k_bksd: Array | QuantizedArray
    v_bksd: Array | QuantizedArray
    positions_bs: Array | None = None

    def store(
        self,
        k_btkd: Array,
        v_btkd: Array,
        positions_bt: Array,
        slots_bt: Array | None = None,
        *,
        consecutive: bool = False,
    ) -> "LayerCache":
        """Returns the cache with new tokens at ``positions_bt`` (batch, new tokens); slots as in ``store_tokens``."""

        def put(stored: Array | QuantizedArray, new: Array) -> Array | QuantizedArray:
            return store_tokens(stored, new, positions_bt, slots_bt, consecutive=consecutive)

        positions_bs = self.positions_bs
        if positions_bs is not None:
            stored = put(positions_bs[:, None, :, None], positions_bt[:, :, None, None])
            assert isinstance(stored, Array)  # positions are never quantised
            positions_bs = stored[:, 0, :, 0]
        return LayerCache(put(self.k_bksd, k_btkd), put(self.v_bksd, v_btkd), positions_bs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoutedCache:
    """Cache of a routed layer (``models.depth.routed_depth``): keys and values of the tokens that passed.

    Attributes:
      levels: for each round, the cache of each of its layers; slot i holds the i-th token that passed.
      slots: for each round, the number of slots (its capacity).
      stored_lb: (rounds, batch) int32, number of tokens that passed.
      overflow_lb: (rounds, batch) int32, overflow: number of tokens that were routed but found no free slot.
    """

    levels: tuple[tuple[Any, ...], ...]
    slots: tuple[int, ...] = field(metadata={"static": True})
    stored_lb: Array
    overflow_lb: Array

    def passed_b(self) -> Array:
        """(batch,) int32, number of layers that all tokens so far have passed here, summed over the tokens."""
        return sum(stored_b * len(level) for stored_b, level in zip(self.stored_lb, self.levels, strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The cache of all layers.

    Attributes:
      layers: for each layer, a ``LayerCache`` or the cache of its depth policy.
      lengths_b: (batch,) int32, number of tokens in each row.
    """

    layers: tuple[Any, ...]
    lengths_b: Array


def empty_cache(config: "ModelConfig", batch: int, slots: int) -> Cache:
    """Returns a cache without tokens, with ``slots`` slots per row, in the model's dtype."""
    return Cache(
        layers=tuple(block.depth.empty_cache(block, config, batch, slots) for block in config.layers),
        lengths_b=jnp.zeros((batch,), jnp.int32),
    )


def empty_layer_cache(attention: "Attention", model: "ModelConfig", batch: int, slots: int) -> LayerCache:
    """Returns a layer's cache without tokens, with ``slots`` slots per row, in the model's dtype or quantised."""
    k_bksd, v_bksd = (empty_slots(model, batch, attention.n_kv_heads, slots, attention.d_head) for _ in "kv")
    has_mod = attention.score_mod is not None
    return LayerCache(k_bksd, v_bksd, jnp.zeros((batch, slots), jnp.int32) if has_mod else None)


def empty_slots(model: "ModelConfig", batch: int, heads: int, slots: int, size: int) -> Array | QuantizedArray:
    """(batch, heads, slots, size) zeros in the model's dtype, or in the format of ``quantization.cache``."""
    empty = jnp.zeros((batch, heads, slots, size), model.dtype)
    format = model.quantization.cache
    if format is None:
        return empty
        # Zeros in the shape of the quantised array: XLA would quantise constant zeros at compile time.
    stored = jax.eval_shape(lambda: quantize(empty, format, -1))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), stored)


def store_tokens(
    stored_bksd: Array | QuantizedArray,
    new_btkd: Array,
    positions_bt: Array,
    slots_bt: Array | None = None,
    *,
    consecutive: bool = False,
) -> Array | QuantizedArray:
    """Writes new tokens into their slots, in the format of the cache; levels and scales go to the same slots.

    Args:
      stored_bksd: (batch, heads, slots, size).
      new_btkd: (batch, new tokens, heads, size), any float dtype.
      positions_bt: (batch, new tokens) int32, consecutive; used as the slots if ``slots_bt`` is None.
      slots_bt: (batch, new tokens) int32; a token after the last slot is dropped. None: the positions.
      consecutive: the slots are consecutive and exist, so that one slice can be written.
    """
    at_bt = positions_bt if slots_bt is None else slots_bt
    scattered = slots_bt is not None and new_btkd.shape[1] > 1 and not consecutive

    def put(old_bksd: Array, new_bktd: Array) -> Array:
        if scattered:
            return jax.vmap(lambda row, new, at: row.at[:, at].set(new, mode="drop"))(old_bksd, new_bktd, at_bt)
        if len(old_bksd) == 1:  # a single slice update, which XLA does in place
            return jax.lax.dynamic_update_slice(old_bksd, new_bktd, (0, 0, at_bt[0, 0], 0))
        update = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, at, 0)))
        return update(old_bksd, new_bktd, at_bt[:, 0])

    new_bktd = new_btkd.swapaxes(1, 2)
    if isinstance(stored_bksd, QuantizedArray):
        return jax.tree.map(put, stored_bksd, quantize(new_bktd, stored_bksd.format, -1))
    return put(stored_bksd, new_bktd.astype(stored_bksd.dtype))
