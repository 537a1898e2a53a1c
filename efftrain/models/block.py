"""One transformer block."""

from typing import TYPE_CHECKING, Any

from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.linear import RMSNorm
from efftrain.sharding.rules import constrain

if TYPE_CHECKING:
    from efftrain.models.config import BlockConfig, ModelConfig


class Block(nnx.Module):
    """Residual block of the attention and the feed-forward part that its configuration builds, pre-norm.

    A subclass that replaces ``join`` is another kind of block, in training and in decoding.

    Decoding has two parts, of which early exits skip the second: ``write_cache`` puts the keys and values of new tokens
    into the cache, where later tokens need them, and ``attend_cached`` computes the block.
    """

    def __init__(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.attention = block.attention.build(model, rngs=rngs)
        self.mlp_norm = RMSNorm(model.d_model, eps=model.norm_eps)
        self.mlp = block.mlp.build(model.d_model, n_layers=model.n_layers, dtype=model.dtype, rngs=rngs)
        self.reads_tokens, self.reads_segments = block.mlp.reads_tokens, block.mlp.reads_segments

    def __call__(
        self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None, tokens_bt: Array | None = None
    ) -> tuple[Array, dict]:
        """Training: (batch, length, d_model) and metrics.

        Args:
          x_btd: (batch, length, d_model).
          positions_bt: (batch, length).
          segments_bt: (batch, length); no token sees another segment. None: one segment a row.
          tokens_bt: (batch, length) ids, for a feed-forward part that reads them.
        """
        attended_btd = self.attention(self.attention_norm(x_btd), positions_bt, segments_bt)
        return self._join(x_btd, attended_btd, tokens_bt, segments_bt)

    def join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None
    ) -> tuple[Array, dict]:
        """The stream after the block, and metrics, from the stream before it and what attention made of that."""
        x_btd += attended_btd
        out_btd, metrics = self.feed_forward(self.mlp_norm(x_btd), tokens_bt, segments_bt)
        return x_btd + out_btd, metrics

    def feed_forward(self, x_btd: Array, tokens_bt: Array | None, segments_bt: Array | None) -> tuple[Array, dict]:
        """The feed-forward part, with the token ids and the segments where it reads them."""
        read = {"segments_bt": segments_bt} if self.reads_segments else {}
        if not self.reads_tokens:
            return self.mlp(x_btd, **read)
        if tokens_bt is None:
            raise ConfigError(
                f"{type(self.mlp).__name__} reads token ids, and this computation of single layers does not have them; "
                "use the whole model, or a feed-forward part that does not read them"
            )
        return self.mlp(x_btd, tokens_bt, **read)

    def extend(
        self,
        x_btd: Array,
        positions_bt: Array,
        cache: Any,
        *,
        fresh: bool,
        valid_bt: Array | None = None,
        tokens_bt: Array | None = None,
    ) -> tuple[Array, Any]:
        """New tokens after those in the cache.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens), consecutive in each row.
          cache: this layer's.
          fresh: the cache is empty, so the new tokens see only each other.
          valid_bt: (batch, new tokens) bool, False after the end of a shorter row. Of no concern here: what such a
            token leaves in the cache is overwritten before it is seen.
          tokens_bt: as in the call.
        """
        if not fresh:
            cache = self.write_cache(x_btd, positions_bt, cache)
            return self.attend_cached(x_btd, positions_bt, cache, tokens_bt=tokens_bt), cache
        return self.prefill(x_btd, positions_bt, cache, tokens_bt=tokens_bt)

    def prefill(
        self,
        x_btd: Array,
        positions_bt: Array,
        cache: Any,
        slots_bt: Array | None = None,
        tokens_bt: Array | None = None,
    ) -> tuple[Array, Any]:
        """``write_cache`` and ``attend_cached`` for an empty cache: the slots are not read."""
        out_btd, cache = self.attention.prefill(self.attention_norm(x_btd), positions_bt, cache, slots_bt)
        return self._join(x_btd, out_btd, tokens_bt)[0], cache

    def write_cache(self, x_btd: Array, positions_bt: Array, cache: Any, slots_bt: Array | None = None) -> Any:
        """The cache with the new tokens; ``slots_bt``: where, consecutive. None: at their positions."""
        return self.attention.write_cache(self.attention_norm(x_btd), positions_bt, cache, slots_bt)

    def attend_cached(
        self,
        x_btd: Array,
        positions_bt: Array,
        cache: Any,
        slots_bt: Array | None = None,
        tokens_bt: Array | None = None,
    ) -> Array:
        """What the block makes of new tokens whose keys and values the cache has; arguments as in ``prefill``."""
        out_btd = self.attention.attend_cached(self.attention_norm(x_btd), positions_bt, cache, slots_bt)
        return self._join(x_btd, out_btd, tokens_bt)[0]

    def after_step(self, statistics: dict) -> dict:
        """See ``Decoder.after_step``."""
        return self.mlp.after_step(statistics)

    def _join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None = None
    ) -> tuple[Array, dict]:
        x_btd, metrics = self.join(x_btd, attended_btd, tokens_bt, segments_bt)
        return constrain(x_btd, "batch", "length", None), metrics
