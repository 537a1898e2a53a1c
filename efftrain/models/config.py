"""The configuration of a model: a pattern of blocks, repeated. Components are dataclasses that build their module."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flax import nnx

from efftrain.config import LATER
from efftrain.errors import ConfigError
from efftrain.models.attention_config import Attention
from efftrain.models.checks import one_of, positive
from efftrain.models.components import AttentionConfig, DepthConfig, Dtype, MlpConfig, NormConfig, ResidualConfig
from efftrain.models.mlp import Activation, FeedForward
from efftrain.models.norms import RMS
from efftrain.models.quantization import Quantization

if TYPE_CHECKING:
    from efftrain.models.block import Block

Remat = Literal["none", "full", "dots"]


@dataclass(frozen=True, kw_only=True)
class Dense(MlpConfig):
    """A feed-forward part with a gate: ``down(activation(gate(x)) * up(x))``, by default SwiGLU. Shazeer 2020.

    Attributes:
      d_ff: size of the hidden layer.
      activation: "silu" for SwiGLU, "gelu" or "gelu_tanh" (its approximation by tanh) for GeGLU, or "relu".
      gated: False: no gate, ``down(activation(up(x)))`` (GPT-2).
      bias: all products have a learned bias.
    """

    d_ff: int
    activation: Activation = dataclasses.field(default="silu", metadata=LATER)
    gated: bool = dataclasses.field(default=True, metadata=LATER)
    bias: bool = dataclasses.field(default=False, metadata=LATER)

    def __post_init__(self):
        positive("mlp.d_ff", self.d_ff)
        one_of("mlp.activation", self.activation, Activation)

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        return FeedForward(
            d_model,
            self.d_ff,
            n_layers=n_layers,
            dtype=dtype,
            rngs=rngs,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
        )

    def other_flops(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Full(DepthConfig):
    """The depth policy in which every token passes the block once."""

    every_token: ClassVar[bool] = True

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> "Block":
        return block.residual.build(block, model, rngs=rngs)


@dataclass(frozen=True, kw_only=True)
class PreNorm(ResidualConfig):
    """Pre-norm residuals: attention, then the feed-forward part, each on the normalised stream and added to it."""

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> "Block":
        from efftrain.models.block import Block

        return Block(block, model, rngs=rngs)

    def other_flops(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Configuration of one transformer block.

    Attributes:
      attention: the attention part.
      mlp: the feed-forward part.
      depth: which tokens pass the block, and how often.
      residual: how the parts join the residual stream.
    """

    attention: AttentionConfig
    mlp: MlpConfig
    depth: DepthConfig = Full()
    residual: ResidualConfig = dataclasses.field(default=PreNorm(), metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class LayerDropout:
    """Layers skipped at random in training, deep ones more often, so that early layers learn to predict without them.

    Attributes:
      rate: probability of skipping the last layer, at full strength; 0: no layer dropout.
      after: number of training steps before the first layer is skipped; a model that has learnt most is hurt less.
      ramp_steps: number of steps after that over which the strength grows from 0 to full, exponentially. 0: full at
        once.
      per_row: draw for each row separately. Every layer is then computed, which saves nothing. False: one draw for all
        rows that are computed together, and a skipped layer costs nothing (except on a mesh of several CPU devices, see
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
    """Configuration of a decoder.

    Attributes:
      vocab_size: number of rows of the embedding; at least the size of the tokenizer's vocabulary.
      d_model: width of the residual stream.
      pattern: the blocks that are repeated, in order; "every second block is MoE" is a pattern of two blocks.
      n_repeats: number of times that the pattern is repeated in the stack.
      max_length: length in tokens of the longest sequence that the model is trained on or decodes.
      tied_embedding: the head is the transpose of the embedding.
      norm_eps: see ``ops.norm``.
      dtype: dtype of activations and products; parameters are float32.
      scan: trace one block for all repeats (short compilation, for deep models). False: trace every layer (faster on
        CPU).
      remat: what the backward pass recomputes: nothing ("none"), all of a block ("full"), or all but the dense products
        ("dots").
      layer_dropout: layers that training skips at random.
      quantization: which matrices are quantised, and whether the cache is.
      norm: the form of all norms.
      embedding_multiplier: factor of the embedded tokens, rounded to the dtype (Gemma: the root of d_model).
      residual_multiplier: factor of the outputs of attention and feed-forward parts (Granite).
      logits_multiplier: factor of the normalised states before the head (Granite).
      logit_softcap: bound c of the logits, which become ``c tanh(logits / c)`` (Gemma 2). None: no bound.
      head_bias: the head, which is then not tied, has a learned bias.
      learned_positions: add a learned vector for each of ``max_length`` positions to the embedded tokens (GPT-2).
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
    norm: NormConfig = dataclasses.field(default=RMS(), metadata=LATER)
    embedding_multiplier: float = dataclasses.field(default=1.0, metadata=LATER)
    residual_multiplier: float = dataclasses.field(default=1.0, metadata=LATER)
    logits_multiplier: float = dataclasses.field(default=1.0, metadata=LATER)
    logit_softcap: float | None = dataclasses.field(default=None, metadata=LATER)
    head_bias: bool = dataclasses.field(default=False, metadata=LATER)
    learned_positions: bool = dataclasses.field(default=False, metadata=LATER)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_repeats", "max_length"):
            positive(f"model.{name}", getattr(self, name))
        if not self.pattern:
            raise ConfigError("model.pattern is empty; give it at least one BlockConfig")
        one_of("model.dtype", self.dtype, Dtype)
        one_of("model.remat", self.remat, Remat)
        for name in ("embedding_multiplier", "residual_multiplier", "logits_multiplier", "logit_softcap"):
            if (factor := getattr(self, name)) is not None and not factor > 0:
                raise ConfigError(f"model.{name} is {factor}; give a positive number")
        if self.head_bias and self.tied_embedding:
            raise ConfigError("model.head_bias needs a head of its own; set model.tied_embedding to False")
        for block in self.pattern:
            if self.quantization.cache is not None and not block.attention.quantizes_cache:
                raise ConfigError(
                    f"quantization.cache is set, and {type(block.attention).__name__} does not support it; leave "
                    "quantization.cache None, or quantise the cache of this module and set quantizes_cache"
                )

    @property
    def n_layers(self) -> int:
        """``n_repeats`` times the blocks of ``pattern``; a block that is applied several times counts once."""
        return len(self.pattern) * self.n_repeats

    @property
    def layers(self) -> tuple[BlockConfig, ...]:
        """The configuration of every layer, first to last."""
        return self.pattern * self.n_repeats

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def with_blocks(self, **changes: Any) -> "ModelConfig":
        """Returns the same stack with these fields replaced in every block, such as ``mlp=Dense(d_ff=64)``."""
        return self.replace(pattern=tuple(dataclasses.replace(block, **changes) for block in self.pattern))


def standard_attention(block: BlockConfig, technique: str) -> Attention:
    """Returns the attention of a block, for a technique that needs its heads.

    Raises:
      ConfigError: the attention is a fork's own.
    """
    if not isinstance(block.attention, Attention):
        raise ConfigError(
            f"{technique} reads the heads of efftrain's Attention, and the model has {type(block.attention).__name__}; "
            f"use a model with Attention, or remove {technique}"
        )
    return block.attention


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
    """Returns the configuration of a plain dense decoder in the shape of Llama: one block, repeated."""
    positive("n_heads", n_heads)
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
