"""The decoder: a causal language model of an embedding, a stack of blocks and a head."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh

from efftrain.errors import ConfigError
from efftrain.models.block import Layer
from efftrain.models.cache import Cache
from efftrain.models.config import ModelConfig
from efftrain.models.linear import Embedding, Linear, scaled
from efftrain.models.quantization import prepare
from efftrain.models.stack import add_metrics, dropout_rates, dropout_strength, run_layers, stack_layers, unstack
from efftrain.ops.fused_linear_loss import VocabularyHead
from efftrain.sharding.rules import constrain


class StepCount(nnx.Variable):
    """Number of training steps that the model has seen, which ramps depend on. Not trained."""


class Decoder(nnx.Module):
    """A causal language model; see ``ModelConfig``.

    Attributes:
      blocks: for each position of the pattern, one ``Block`` (or the module of its depth policy) whose parameters are
        stacked over the repeats.
      steps: () int32, number of training steps; only in a model with layer dropout.
      helpers: modules that an objective trains beside the model; only during such a training.
    """

    helpers: nnx.List

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.d_model, rngs=rngs, dtype=config.dtype)
        self.blocks = nnx.List(
            stack_layers(lambda keys, block=block: block.depth.build(block, config, rngs=keys), config.n_repeats, rngs)
            for block in config.pattern
        )
        self.norm = config.norm.build(config.d_model, eps=config.norm_eps)
        if not config.tied_embedding:
            self.head = Linear(
                config.d_model,
                config.vocab_size,
                axes=("embed", "vocab"),
                dtype=config.dtype,
                rngs=rngs,
                bias=config.head_bias,
            )
        if config.learned_positions:
            self.positions = Embedding(
                config.max_length, config.d_model, rngs=rngs, dtype=config.dtype, axis="positions"
            )
        if config.layer_dropout.rate:
            self.steps = StepCount(jnp.zeros((), jnp.int32), axes=(), units=())
        prepare(self, config.quantization)

    def __call__(
        self, tokens_bt: Array, *, segments_bt: Array | None = None, positions_bt: Array | None = None
    ) -> Array:
        """Returns logits (batch, length, vocab) in float32. Training uses ``hidden``, and never holds all logits."""
        return self.logits(self.hidden(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt)[0])

    def hidden(
        self,
        tokens_bt: Array,
        *,
        segments_bt: Array | None = None,
        positions_bt: Array | None = None,
        key: Array | None = None,
    ) -> tuple[Array, dict]:
        """Returns the normalised states before the head (batch, length, d_model), and metrics; see ``states``."""
        x_btd, _, metrics = self.states(tokens_bt, segments_bt=segments_bt, positions_bt=positions_bt, key=key)
        return self.normalised(x_btd), metrics

    def states(
        self,
        tokens_bt: Array,
        *,
        segments_bt: Array | None = None,
        positions_bt: Array | None = None,
        key: Array | None = None,
        exits_e: Array | None = None,
    ) -> tuple[Array, Array | None, dict]:
        """Returns the residual stream after the last layer and, if asked for, after other layers.

        Args:
          tokens_bt: (batch, length) integers.
          segments_bt: (batch, length) integers; no token sees another segment; 0 is padding. None: one segment per row.
          positions_bt: (batch, length) positions of the tokens in their document. None: 0, 1, 2, ... in each row.
          key: random key for what training draws (layer dropout). None: nothing is drawn, as in evaluation.
          exits_e: (e,) integers, indices of the layers after which the stream is returned too. None: no other layers.

        Returns:
          (batch, length, d_model) in the compute dtype; (e, batch, length, d_model) or None; and the layers' metrics as
          (sum, count) pairs.

        Raises:
          ConfigError: the row is longer than ``max_length``.
        """
        self._check_length(tokens_bt.shape[1])
        if positions_bt is None:
            positions_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1]), tokens_bt.shape)
        x_btd = constrain(self.embed(tokens_bt, positions_bt), "batch", "length", None)
        kept = self._kept(key, tokens_bt.shape[0])
        x_btd, exit_ebtd, metrics = run_layers(
            self.blocks,
            x_btd,
            lambda block, x: block(x, positions_bt, segments_bt, tokens_bt),
            n_repeats=self.config.n_repeats,
            scan=self.config.scan,
            remat=self.config.remat,
            kept=kept,
            exits_e=exits_e,
        )
        if kept is not None:  # ``after_step`` must count the step, and it is called only if there are statistics
            metrics |= {"depth/kept": (kept.sum(dtype=jnp.float32), jnp.float32(kept.size))}
            metrics.setdefault("statistics", [{} for _ in self.blocks])
        return x_btd, exit_ebtd, metrics

    def _kept(self, key: Array | None, batch: int) -> Array | None:
        """The layers that training computes: (layers,) or (layers, batch) bool. None: all."""
        dropout, n = self.config.layer_dropout, self.config.n_layers
        if key is None or not dropout.rate:
            return None
        rates_l = dropout_rates(n, dropout.rate, dropout_strength(self.steps[...], dropout.after, dropout.ramp_steps))
        drawn = jax.random.uniform(key, (n, batch) if dropout.per_row else (n,))
        return drawn >= (rates_l[:, None] if dropout.per_row else rates_l)

    def extend(
        self,
        tokens_bt: Array,
        cache: Cache,
        *,
        layers: list[Layer] | None = None,
        fresh: bool = False,
        n_valid_b: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Computes new tokens that follow those in the cache.

        Args:
          tokens_bt: (batch, new tokens).
          cache: the rows may have different lengths; the caller must make sure that the new tokens have slots.
          layers: ``self.layers()``, for a loop that takes the stack apart once and not in every iteration. None: it is
            taken apart here.
          fresh: the cache is empty (prefill), which is cheaper because its slots are not read.
          n_valid_b: (batch,) number of valid new tokens, which come first in each row. None: all.

        Returns:
          Normalised states (batch, new tokens, d_model), and the cache with the valid new tokens.

        Raises:
          ConfigError: there are more new tokens than ``max_length``.
        """
        length = tokens_bt.shape[1]
        self._check_length(length)
        positions_bt = cache.lengths_b[:, None] + jnp.arange(length)
        n_valid_b = jnp.full(len(tokens_bt), length, jnp.int32) if n_valid_b is None else n_valid_b
        x_btd, layer_caches = extend_layers(
            layers or self.layers(),
            self.embed(tokens_bt, positions_bt),
            positions_bt,
            cache.layers,
            fresh=fresh,
            valid_bt=jnp.arange(length) < n_valid_b[:, None],
            tokens_bt=tokens_bt,
        )
        return self.normalised(x_btd), Cache(layers=layer_caches, lengths_b=cache.lengths_b + n_valid_b)

    def after_step(self, statistics: list[dict]) -> dict:
        """Updates variables that are not trained but follow the data, from the ``statistics`` of a step.

        Returns:
          The figures of the step as (sum, count) pairs. Figures that are arrays are not summed over the blocks: their
          names end with the position in the pattern.
        """
        figures: dict = {}
        if self.config.layer_dropout.rate:
            self.steps[...] += 1
        for position, (stack, found) in enumerate(zip(self.blocks, statistics, strict=True)):
            more = stack.after_step(found) if found else {}
            named = {name if pair[0].ndim == 0 else f"{name}/{position}": pair for name, pair in more.items()}
            figures = add_metrics(figures, named)
        return figures

    def layers(self) -> list[Layer]:
        """Returns the blocks of the stack as single modules, first to last.

        Their parameters are views of those of an ``unrolled`` model, or copies of those of a model with stacked layers.
        """
        split = [nnx.split(stack) for stack in self.blocks]
        states = [unstack(state, self.config.n_repeats) for _, state in split]
        return [
            nnx.merge(layer_def, layers[i])
            for i in range(self.config.n_repeats)
            for (layer_def, _), layers in zip(split, states, strict=True)
        ]

    def embed(self, tokens_bt: Array, positions_bt: Array) -> Array:
        """Returns what the first layer reads, (batch, length, d_model), for tokens at these positions."""
        x_btd, factor = self.embedding(tokens_bt), self.config.embedding_multiplier
        if factor != 1:
            x_btd = x_btd * jnp.asarray(factor, x_btd.dtype)
        return x_btd + self.positions(positions_bt) if self.config.learned_positions else x_btd

    def normalised(self, x: Array) -> Array:
        """Returns what the head reads, (..., d_model), from the residual stream after any layer."""
        return scaled(self.norm(x), self.config.logits_multiplier)

    def vocabulary_head(self) -> VocabularyHead:
        """Returns the head, with its kernel in the compute dtype, for logits and fused losses."""
        config = self.config
        kernel_dv = self.embedding.as_head() if config.tied_embedding else self.head.cast_kernel()
        bias_v = self.head.bias[...] if config.head_bias else None
        return VocabularyHead(kernel_dv, bias_v, config.logit_softcap)

    def head_kernel(self) -> Array:
        """Returns the kernel of the head, (d_model, vocab) in the compute dtype, for models whose head is only that.

        Raises:
          ConfigError: the logits are more than products of ``norm(x)`` with the kernel.
        """
        for name, plain in (("head_bias", False), ("logit_softcap", None), ("logits_multiplier", 1.0)):
            if (value := getattr(self.config, name)) != plain:
                raise ConfigError(
                    f"model.{name} is {value}, which head_kernel() does not include; use normalised() and "
                    "vocabulary_head()"
                )
        return self.vocabulary_head().kernel_dv

    def logits(self, hidden: Array) -> Array:
        """Computes the head: (..., d_model) -> (..., vocab) in float32."""
        return self.vocabulary_head().logits(hidden)

    def exit_logits(self, x: Array) -> Array:
        """Logits (..., vocab) of the residual stream (..., d_model) after any layer: all exits share norm and head."""
        return self.logits(self.normalised(x))

    def _check_length(self, length: int) -> None:
        if length > self.config.max_length:
            raise ConfigError(
                f"a row has {length} tokens and model.max_length is {self.config.max_length}; raise it or cut the row"
            )


def extend_layers(
    layers: Sequence[Layer],
    x_btd: Array,
    positions_bt: Array,
    caches: Sequence[Any],
    *,
    fresh: bool = False,
    valid_bt: Array | None = None,
    tokens_bt: Array | None = None,
) -> tuple[Array, tuple[Any, ...]]:
    """Computes new tokens in consecutive layers; see ``Block.extend``. Returns the stream and the layers' caches."""
    after = []
    for layer, layer_cache in zip(layers, caches, strict=True):
        x_btd, layer_cache = layer.extend(
            x_btd, positions_bt, layer_cache, fresh=fresh, valid_bt=valid_bt, tokens_bt=tokens_bt
        )
        after.append(layer_cache)
    return x_btd, tuple(after)


def abstract_decoder(config: ModelConfig) -> Decoder:
    """Returns the decoder with shapes in place of arrays, to count parameters without memory."""
    return nnx.merge(*_abstract_parts(config, jax.sharding.get_abstract_mesh()), copy=True)


@lru_cache(maxsize=64)
def _abstract_parts(config: ModelConfig, mesh: AbstractMesh) -> tuple[nnx.GraphDef, nnx.State]:
    """Kept, because tracing a model takes a hundred times as long as merging its parts."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
