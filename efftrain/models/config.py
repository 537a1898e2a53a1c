"""What a model is: a pattern of blocks, repeated. Components are dataclasses that build their own module."""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.quantization import Quantization

Dtype = Literal["float32", "bfloat16"]
Remat = Literal["none", "full", "dots"]
AttentionBackend = Literal["auto", "xla", "splash", "cudnn"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention.

    Attributes:
      n_heads: query heads.
      n_kv_heads: key and value heads; divides n_heads.
      d_head: size of a head, even.
      qk_norm: RMS-normalise queries and keys per head (Henry et al. 2020): stable at high learning rates.
      window: how many tokens back a token sees, itself included; None sees all.
      rope_theta: base of the rotary frequencies.
      n_blocks: query blocks in training, see ``ops.attention``; of the backend "xla".
      backend: the kernel in training, see ``ops.attention_backends``: by the platform of the mesh, or always this one.
    """

    n_heads: int
    n_kv_heads: int
    d_head: int
    qk_norm: bool = False
    window: int | None = None
    rope_theta: float = 10_000.0
    n_blocks: int = 4
    backend: AttentionBackend = "auto"

    def __post_init__(self):
        for name in ("n_heads", "n_kv_heads", "d_head", "n_blocks"):
            _positive(f"attention.{name}", getattr(self, name))
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"attention.n_heads is {self.n_heads}, which attention.n_kv_heads {self.n_kv_heads} does not divide; "
                "make it a multiple"
            )
        if self.d_head % 2:
            raise ConfigError(
                f"attention.d_head is {self.d_head}; rotary embedding needs an even number, use {self.d_head + 1}"
            )
        if self.window is not None:
            _positive("attention.window", self.window)
        _one_of("attention.backend", self.backend, AttentionBackend)


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Base of every feed-forward configuration, those of forks too.

    ``build`` returns a module whose call takes and returns (batch, length, d_model), and beside it a dict of
    (sum, count) metrics, empty where there is nothing to say. Where ``reads_segments``, the call also takes the
    segments as ``segments_bt``: (batch, length) integers, 0 is padding; None: no token is padding.
    """

    @property
    def independent_tokens(self) -> bool:
        """What becomes of a token does not depend on which others are computed with it."""
        return True

    @property
    def reads_segments(self) -> bool:
        """The module is called with the segments too, by which it knows padding."""
        return False

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        raise TypeError(f"{type(self).__name__} has no build method")


@dataclass(frozen=True, kw_only=True)
class Dense(MlpConfig):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``. Shazeer 2020."""

    d_ff: int

    def __post_init__(self):
        _positive("mlp.d_ff", self.d_ff)

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        from efftrain.models.mlp import SwiGLU

        return SwiGLU(d_model, self.d_ff, n_layers=n_layers, dtype=dtype, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Base of every depth policy of a block, those of forks too: which tokens pass the block, and how often.

    ``build`` returns a module with the calls of ``models.block.Block``.

    Attributes:
      every_token: every token passes, once, a plain ``Block``: what exits and drafts need of a stack.
    """

    every_token: ClassVar[bool] = False

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise TypeError(f"{type(self).__name__} has no build method")

    def passes(self) -> tuple[float, ...]:
        """The share of a row's tokens that each layer which a token may pass here computes, in order."""
        return (1.0,)

    def empty_cache(self, block: "BlockConfig", model: "ModelConfig", batch: int, slots: int) -> Any:
        """What the block keeps in decoding, for ``slots`` tokens a row; a pytree."""
        from efftrain.models.cache import empty_layer_cache

        return empty_layer_cache(block.attention, model, batch, slots)


@dataclass(frozen=True, kw_only=True)
class Full(DepthConfig):
    """Every token passes the block once."""

    every_token: ClassVar[bool] = True

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        from efftrain.models.block import Block

        return Block(block, model, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One pre-norm transformer block."""

    attention: Attention
    mlp: MlpConfig
    depth: DepthConfig = Full()


@dataclass(frozen=True, kw_only=True)
class LayerDropout:
    """Layers that are left out at random in training, deep ones more often, so that early ones learn to do without.

    Attributes:
      rate: probability for the last layer, at full strength; 0 for none.
      after: steps that the model is trained before the first layer is left out: what has learnt most is hurt less.
      ramp_steps: steps from then on over which the strength grows from 0 to full, exponentially. 0: full at once.
      per_row: a coin for each row. Every layer is computed, which saves nothing. False: one coin for all rows that are
        computed together, and a layer that is left out costs nothing (but on a mesh of several CPU devices, see
        ``ops.platform.conditional``).

    Source: Elhoushi et al. 2024 (LayerSkip), section 4.1.
    """

    rate: float = 0.0
    after: int = 0
    ramp_steps: int = 0
    per_row: bool = False

    def __post_init__(self):
        if not 0 <= self.rate < 1:
            raise ConfigError(f"layer_dropout.rate is {self.rate}; use 0 for none, or a number below 1 such as 0.1")
        for name in ("after", "ramp_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"layer_dropout.{name} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder.

    Attributes:
      vocab_size: rows of the embedding; at least the tokenizer's.
      d_model: width of the residual stream.
      pattern: the blocks that are repeated, in order: "every second block is MoE" is a pattern of two.
      n_repeats: how often the pattern stands in the stack.
      max_length: the longest sequence that the model is trained on or decodes.
      tied_embedding: the head is the embedding's transpose.
      norm_eps: see ``ops.norm``.
      dtype: of activations and products; parameters are float32.
      scan: one traced block for all repeats (short compile, for deep models) or every layer traced (faster on CPU).
      remat: what the backward pass computes again: nothing, all of a block, or all but the dense products.
      layer_dropout: layers that training leaves out.
      quantization: matrices and cache that are quantised.
    """

    vocab_size: int
    d_model: int
    pattern: tuple[BlockConfig, ...]
    n_repeats: int
    max_length: int
    tied_embedding: bool = False
    norm_eps: float = 1e-5
    dtype: Dtype = "float32"
    scan: bool = False
    remat: Remat = "none"
    layer_dropout: LayerDropout = LayerDropout()
    quantization: Quantization = dataclasses.field(default_factory=Quantization)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_repeats", "max_length"):
            _positive(f"model.{name}", getattr(self, name))
        if not self.pattern:
            raise ConfigError("model.pattern is empty; give it at least one BlockConfig")
        _one_of("model.dtype", self.dtype, Dtype)
        _one_of("model.remat", self.remat, Remat)

    @property
    def n_layers(self) -> int:
        """Blocks of the stack; a block that is passed several times counts once."""
        return len(self.pattern) * self.n_repeats

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The configuration of every layer, first to last."""
        return self.pattern * self.n_repeats

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)


def llama(
    *,
    vocab_size: int,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    d_ff: int,
    max_length: int,
    **changes,
) -> ModelConfig:
    """The plain dense decoder (Llama's shape): one block, repeated."""
    _positive("n_heads", n_heads)
    if d_model % n_heads:
        raise ConfigError(f"model.d_model is {d_model}, which n_heads {n_heads} does not divide; make it a multiple")
    attention = Attention(
        n_heads=n_heads, n_kv_heads=n_heads if n_kv_heads is None else n_kv_heads, d_head=d_model // n_heads
    )
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        pattern=(BlockConfig(attention=attention, mlp=Dense(d_ff=d_ff)),),
        n_repeats=n_layers,
        max_length=max_length,
        **changes,
    )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 1")


def _one_of(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; use one of {', '.join(map(repr, get_args(choices)))}")
