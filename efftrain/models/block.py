"""One transformer block: attention and a feed-forward part around the residual stream."""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.linear import scaled
from efftrain.sharding.rules import constrain

if TYPE_CHECKING:
    from efftrain.models.config import BlockConfig, ModelConfig


class Layer(nnx.Module):
    """Base class of the layers of a stack, which ``DepthConfig.build`` returns; arguments as in ``Block``."""

    def __call__(
        self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None, tokens_bt: Array | None = None
    ) -> tuple[Array, dict]:
        """Computes the layer in training; returns (batch, length, d_model) and metrics."""
        raise NotImplementedError

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
        """Computes new tokens that follow those in the cache; returns their states, and the cache with them."""
        raise NotImplementedError

    def after_step(self, statistics: dict) -> dict:
        """See ``Decoder.after_step``."""
        raise NotImplementedError


@runtime_checkable
class FollowsStatistics(Protocol):
    """A feed-forward part that returns ``statistics`` in training, and is updated from them after the step."""

    def after_step(self, statistics: dict) -> dict: ...


class Block(Layer):
    """Pre-norm residual block with the attention and the feed-forward part that its configuration builds.

    A subclass that replaces ``norms``, the inputs of the parts or ``join`` is another kind of block, in training and
    in decoding.

    Decoding has two parts, because early exits skip the second: ``write_cache`` puts the keys and values of new tokens
    into the cache, where later tokens need them, and ``attend_cached`` computes the block.
    """

    norms: ClassVar[tuple[str, ...]] = ("attention_norm", "mlp_norm")  # the attributes that hold norms of the stream
    attention_norm: nnx.Module
    mlp_norm: nnx.Module

    def __init__(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs):
        for name in self.norms:
            setattr(self, name, model.norm.build(model.d_model, eps=model.norm_eps))
        self.attention = block.attention.build(model, rngs=rngs)
        self.mlp = block.mlp.build(model.d_model, n_layers=model.n_layers, dtype=model.dtype, rngs=rngs)
        self.multiplier = model.residual_multiplier
        self.reads_tokens, self.reads_segments = block.mlp.reads_tokens, block.mlp.reads_segments

    def __call__(
        self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None, tokens_bt: Array | None = None
    ) -> tuple[Array, dict]:
        """Computes the block in training.

        Args:
          x_btd: (batch, length, d_model).
          positions_bt: (batch, length).
          segments_bt: (batch, length); no token sees another segment. None: one segment per row.
          tokens_bt: (batch, length) token ids, for a feed-forward part that reads them.

        Returns:
          (batch, length, d_model) and metrics.
        """
        attended_btd = self.attention(self.attention_input(x_btd), positions_bt, segments_bt)
        return self._join(x_btd, attended_btd, tokens_bt, segments_bt)

    def attention_input(self, x_btd: Array) -> Array:
        """Returns what attention reads, from the stream before the block."""
        return self.attention_norm(x_btd)

    def mlp_input(self, x_btd: Array) -> Array:
        """Returns what the feed-forward part reads, from the stream that ``join`` gives it."""
        return self.mlp_norm(x_btd)

    def join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None
    ) -> tuple[Array, dict]:
        """Returns the stream after the block, and metrics, from the stream before it and the output of attention."""
        x_btd = self.add(x_btd, attended_btd)
        out_btd, metrics = self.feed_forward(self.mlp_input(x_btd), tokens_bt, segments_bt)
        return self.add(x_btd, out_btd), metrics

    def add(self, x_btd: Array, *outs_btd: Array) -> Array:
        """Adds outputs of the parts, times ``model.residual_multiplier``, to the stream."""
        for out_btd in outs_btd:
            x_btd = x_btd + scaled(out_btd, self.multiplier)
        return x_btd

    def feed_forward(self, x_btd: Array, tokens_bt: Array | None, segments_bt: Array | None) -> tuple[Array, dict]:
        """Computes the feed-forward part, with the token ids and the segments if it reads them."""
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
        """Computes new tokens that follow those in the cache.

        Args:
          x_btd: (batch, new tokens, d_model).
          positions_bt: (batch, new tokens), consecutive in each row.
          cache: cache of this layer.
          fresh: the cache is empty, so that the new tokens see only each other.
          valid_bt: (batch, new tokens) bool, False after the end of a shorter row. Not used here, because what such a
            token leaves in the cache is overwritten before it is seen.
          tokens_bt: as in ``__call__``.

        Returns:
          (batch, new tokens, d_model), and the cache with the new tokens.
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
        """``write_cache`` and ``attend_cached`` for an empty cache, whose slots need not be read."""
        out_btd, cache = self.attention.prefill(self.attention_input(x_btd), positions_bt, cache, slots_bt)
        return self._join(x_btd, out_btd, tokens_bt)[0], cache

    def write_cache(self, x_btd: Array, positions_bt: Array, cache: Any, slots_bt: Array | None = None) -> Any:
        """Returns the cache with the new tokens in the consecutive slots ``slots_bt``. None: at their positions."""
        return self.attention.write_cache(self.attention_input(x_btd), positions_bt, cache, slots_bt)

    def attend_cached(
        self,
        x_btd: Array,
        positions_bt: Array,
        cache: Any,
        slots_bt: Array | None = None,
        tokens_bt: Array | None = None,
    ) -> Array:
        """Computes the block for new tokens whose keys and values are in the cache; arguments as in ``prefill``."""
        out_btd = self.attention.attend_cached(self.attention_input(x_btd), positions_bt, cache, slots_bt)
        return self._join(x_btd, out_btd, tokens_bt)[0]

    def after_step(self, statistics: dict) -> dict:
        """See ``Decoder.after_step``."""
        if not isinstance(self.mlp, FollowsStatistics):
            raise TypeError(f"{type(self.mlp).__name__} returns statistics, but has no after_step method for them")
        return self.mlp.after_step(statistics)

    def _join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None = None
    ) -> tuple[Array, dict]:
        x_btd, metrics = self.join(x_btd, attended_btd, tokens_bt, segments_bt)
        return constrain(x_btd, "batch", "length", None), metrics
