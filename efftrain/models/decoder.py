"""The decoder: embedding, a stack of blocks, a head."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.errors import ConfigError
from efftrain.models.attention import SelfAttention
from efftrain.models.cache import Cache, LayerCache
from efftrain.models.config import BlockConfig, ModelConfig
from efftrain.models.depth import add_metrics, run_layers, stack_layers, unstack
from efftrain.models.linear import Embedding, Linear, RMSNorm
from efftrain.sharding.rules import constrain


class Block(nnx.Module):
    """Pre-norm residual block: attention, then the feed-forward part that its configuration builds."""

    def __init__(self, block: BlockConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        d_model, n_layers, dtype = model.d_model, model.n_layers, model.dtype
        self.attention_norm = RMSNorm(d_model, eps=model.norm_eps)
        self.attention = SelfAttention(
            block.attention, d_model, n_layers=n_layers, norm_eps=model.norm_eps, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = RMSNorm(d_model, eps=model.norm_eps)
        self.mlp = block.mlp.build(d_model, n_layers=n_layers, dtype=dtype, rngs=rngs)

    def __call__(self, x_btd: Array, positions_bt: Array, segments_bt: Array | None = None) -> tuple[Array, dict]:
        x_btd += self.attention(self.attention_norm(x_btd), positions_bt, segments_bt)
        return self._feed_forward(x_btd)

    def extend(self, x_btd: Array, positions_bt: Array, cache: LayerCache, *, fresh: bool) -> tuple[Array, LayerCache]:
        out_btd, cache = self.attention.extend(self.attention_norm(x_btd), positions_bt, cache, fresh=fresh)
        return self._feed_forward(x_btd + out_btd)[0], cache

    def _feed_forward(self, x_btd: Array) -> tuple[Array, dict]:
        out_btd, metrics = self.mlp(self.mlp_norm(x_btd))
        return constrain(x_btd + out_btd, "batch", "length", None), metrics


class Decoder(nnx.Module):
    """A causal language model; see ``ModelConfig``.

    Attributes:
      blocks: for each position of the pattern, one ``Block`` whose parameters are stacked over the repeats.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs, dtype=config.dtype)
        self.blocks = nnx.List(
            stack_layers(lambda keys, block=block: Block(block, config, rngs=keys), config.n_repeats, rngs)
            for block in config.pattern
        )
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        if not config.tied_embedding:
            self.head = Linear(
                config.d_model, config.vocab_size, axes=("embed", "vocab"), dtype=config.dtype, rngs=rngs
            )

    def __call__(
        self, tokens_bt: Array, *, segments_bt: Array | None = None, positions_bt: Array | None = None
    ) -> Array:
        """Logits (batch, length, vocab) in float32. Training uses ``hidden`` and never forms them all."""
        return self.logits(self.hidden(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt)[0])

    def hidden(
        self, tokens_bt: Array, *, segments_bt: Array | None = None, positions_bt: Array | None = None
    ) -> tuple[Array, dict]:
        """Normalised states before the head.

        Args:
          tokens_bt: (batch, length) integers.
          segments_bt: (batch, length) integers; no token sees another segment. None: one segment a row.
          positions_bt: (batch, length) for the rotary embedding. None: 0, 1, 2, ...

        Returns:
          (batch, length, d_model) in the compute dtype, and the layers' metrics as (sum, count) pairs.

        Raises:
          ConfigError: the row is longer than ``max_length``.
        """
        self._check_length(tokens_bt.shape[1])
        if positions_bt is None:
            positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
        x_btd = constrain(self.embedding(tokens_bt), "batch", "length", None)
        x_btd, metrics = run_layers(
            self.blocks,
            x_btd,
            lambda block, x: block(x, positions_bt, segments_bt),
            n_repeats=self.config.n_repeats,
            scan=self.config.scan,
            remat=self.config.remat,
        )
        return self.norm(x_btd), metrics

    def extend(
        self, tokens_bt: Array, cache: Cache, *, layers: list[Block] | None = None, fresh: bool = False
    ) -> tuple[Array, Cache]:
        """Reads new tokens behind those in the cache.

        Args:
          tokens_bt: (batch, new tokens).
          cache: lengths may differ between rows; room for the new tokens is the caller's to provide.
          layers: ``self.layers()``, for a loop that takes the stack apart once and not in every round.
          fresh: the cache is empty (prefill): cheaper, the slots are not read.

        Returns:
          Normalised states (batch, new tokens, d_model), and the cache with the new tokens.
        """
        length = tokens_bt.shape[1]
        self._check_length(length)
        positions_bt = cache.lengths_b[:, None] + jnp.arange(length)
        x_btd = self.embedding(tokens_bt)
        caches = []
        for block, layer_cache in zip(layers or self.layers(), cache.layers, strict=True):
            x_btd, layer_cache = block.extend(x_btd, positions_bt, layer_cache, fresh=fresh)
            caches.append(layer_cache)
        return self.norm(x_btd), Cache(layers=tuple(caches), lengths_b=cache.lengths_b + length)

    def after_step(self, statistics: list[dict]) -> dict:
        """Updates what is not trained but follows the data, from the ``statistics`` of a step.

        Returns:
          The step's figures as (sum, count) pairs. Figures that are arrays are not added up: their names end with the
          position in the pattern.
        """
        figures: dict = {}
        for position, (stack, found) in enumerate(zip(self.blocks, statistics, strict=True)):
            more = stack.mlp.after_step(found) if found else {}
            named = {name if pair[0].ndim == 0 else f"{name}/{position}": pair for name, pair in more.items()}
            figures = add_metrics(figures, named)
        return figures

    def layers(self) -> list[Block]:
        """The blocks of the stack as single modules, first to last."""
        split = [nnx.split(stack) for stack in self.blocks]
        states = [unstack(state, self.config.n_repeats) for _, state in split]
        return [
            nnx.merge(layer_def, layers[i])
            for i in range(self.config.n_repeats)
            for (layer_def, _), layers in zip(split, states, strict=True)
        ]

    def head_kernel(self) -> Array:
        """(d_model, vocab) in the compute dtype."""
        return self.embedding.as_head() if self.config.tied_embedding else self.head.cast_kernel()

    def logits(self, hidden: Array) -> Array:
        """(..., d_model) -> (..., vocab) in float32."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        product = jnp.matmul(flat, self.head_kernel(), preferred_element_type=jnp.float32)
        return product.reshape(*hidden.shape[:-1], -1)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ConfigError(
                f"a row has {length} tokens and model.max_length is {self.config.max_length}; raise it or cut the row"
            )
