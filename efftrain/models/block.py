"""One pre-norm transformer block."""

from flax import nnx
from jax import Array

from efftrain.models.attention import SelfAttention
from efftrain.models.cache import LayerCache
from efftrain.models.config import BlockConfig, ModelConfig
from efftrain.models.linear import RMSNorm
from efftrain.sharding.rules import constrain


class Block(nnx.Module):
    """Pre-norm residual block: attention, then the feed-forward part that its configuration builds.

    Decoding falls in two parts for those who skip the second: ``remember`` puts the keys and values of new tokens into
    the cache, which later tokens need from every token, and ``recall`` computes the block.
    """

    def __init__(self, block: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d_model, n_layers, dtype = model.d_model, model.n_layers, model.dtype
        self.attention_norm = RMSNorm(d_model, eps=model.norm_eps)
        self.attention = SelfAttention(
            block.attention,
            d_model,
            n_layers=n_layers,
            norm_eps=model.norm_eps,
            dtype=dtype,
            cache=model.quantization.cache,
            rngs=rngs,
        )
        self.mlp_norm = RMSNorm(d_model, eps=model.norm_eps)
        self.mlp = block.mlp.build(d_model, n_layers=n_layers, dtype=dtype, rngs=rngs)
        self.mlp_reads_segments = block.mlp.reads_segments

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> tuple[Array, dict]:
        x_btd += self.attention(self.attention_norm(x_btd), positions_bt, segments_bt)
        return self._feed_forward(x_btd, segments_bt)

    def extend(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, *, fresh: bool, real_bt: Array | None = None
    ) -> tuple[Array, LayerCache]:
        """New tokens behind those in the cache.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens), consecutive in each row.
          cache: this layer's.
          fresh: the cache is empty, so the new tokens see only each other.
          real_bt: (batch, new tokens) bool, False behind the end of a shorter row. Of no concern here: what such a
            token leaves in the cache is overwritten before it is seen.
        """
        if not fresh:
            cache = self.remember(x_btd, positions_bt, cache)
            return self.recall(x_btd, positions_bt, cache), cache
        return self.read(x_btd, positions_bt, cache)

    def read(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> tuple[Array, LayerCache]:
        """``remember`` and ``recall`` for an empty cache: the slots are not read."""
        out_btd, cache = self.attention.read(self.attention_norm(x_btd), positions_bt, cache, slots_bt)
        return self._feed_forward(x_btd + out_btd)[0], cache

    def remember(
        self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None
    ) -> LayerCache:
        """The cache with the new tokens; ``slots_bt``: where, consecutive. None: at their positions."""
        return self.attention.remember(self.attention_norm(x_btd), positions_bt, cache, slots_bt)

    def recall(self, x_btd: Array, positions_bt: Array, cache: LayerCache, slots_bt: Array | None = None) -> Array:
        """What the block makes of new tokens whose keys and values the cache has; arguments as in ``remember``."""
        out_btd = self.attention.recall(self.attention_norm(x_btd), positions_bt, cache, slots_bt)
        return self._feed_forward(x_btd + out_btd)[0]

    def after_step(self, statistics: dict) -> dict:
        """See ``Decoder.after_step``."""
        return self.mlp.after_step(statistics)

    def _feed_forward(self, x_btd: Array, segments_bt: Array | None = None) -> tuple[Array, dict]:
        read = {"segments_bt": segments_bt} if self.mlp_reads_segments else {}
        out_btd, metrics = self.mlp(self.mlp_norm(x_btd), **read)
        return constrain(x_btd + out_btd, "batch", "length", None), metrics
