"""Other places of the norms in a block than before its parts: after them, on both sides, or side by side."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flax import nnx
from jax import Array

from efftrain.models.block import Block
from efftrain.models.components import ResidualConfig

if TYPE_CHECKING:
    from efftrain.models.config import BlockConfig, ModelConfig


@dataclass(frozen=True, kw_only=True)
class PostNorm(ResidualConfig):
    """Norms of the outputs: ``x += norm(attention(x))``, then ``x += norm(mlp(x))``. OLMo et al. 2024 (OLMo 2)."""

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> Block:
        return PostNormBlock(block, model, rngs=rngs)

    def other_flops(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Sandwich(ResidualConfig):
    """Norms of inputs and outputs: ``x += norm(attention(norm(x)))``, then the same with the feed-forward part.

    Source: Ding et al. 2021 (CogView); Gemma 2 and 3.
    """

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> Block:
        return SandwichBlock(block, model, rngs=rngs)

    def other_flops(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Parallel(ResidualConfig):
    """Attention and feed-forward part side by side: ``x += attention(norm(x)) + mlp(norm(x))``. GPT-J, PaLM, Phi-2.

    Attributes:
      shared_norm: both parts read the same norm. False: each has a norm of its own (GPT-NeoX).
    """

    shared_norm: bool = True

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> Block:
        kind = SharedNormBlock if self.shared_norm else ParallelBlock
        return kind(block, model, rngs=rngs)

    def other_flops(self) -> float:
        return 0.0


class PostNormBlock(Block):
    """The block of ``PostNorm``."""

    norms = ("attention_post_norm", "mlp_post_norm")
    attention_post_norm: nnx.Module
    mlp_post_norm: nnx.Module

    def attention_input(self, x_btd: Array) -> Array:
        return x_btd

    def mlp_input(self, x_btd: Array) -> Array:
        return x_btd

    def join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None
    ) -> tuple[Array, dict]:
        x_btd = self.add(x_btd, self.attention_post_norm(attended_btd))
        out_btd, metrics = self.feed_forward(self.mlp_input(x_btd), tokens_bt, segments_bt)
        return self.add(x_btd, self.mlp_post_norm(out_btd)), metrics


class SandwichBlock(PostNormBlock):
    """The block of ``Sandwich``."""

    norms = ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm")
    attention_input = Block.attention_input
    mlp_input = Block.mlp_input


class ParallelBlock(Block):
    """The block of ``Parallel`` with two norms."""

    def join(
        self, x_btd: Array, attended_btd: Array, tokens_bt: Array | None, segments_bt: Array | None
    ) -> tuple[Array, dict]:
        out_btd, metrics = self.feed_forward(self.mlp_input(x_btd), tokens_bt, segments_bt)
        return self.add(x_btd, attended_btd, out_btd), metrics


class SharedNormBlock(ParallelBlock):
    """The block of ``Parallel`` with one norm, which the compiler computes once for both parts."""

    norms = ("attention_norm",)
    mlp_input = Block.attention_input
