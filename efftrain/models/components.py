"""The bases of what a block is made of: small configurations that build a module. A fork brings its own subclass.

Each base says what the built module is called with; ``recipes/README.md`` lists the seams. A variable of such a module
has the metadata ``axes``, a logical name for each dimension (``sharding.rules``); None keeps a dimension whole.

Whether a component states its FLOPs: products with parameter matrices are counted from the parameters. A base's
``..._flops`` method states the other products of a token; where it returns None, ``measure.cost.flops`` traces the
module and counts them, those that a mask hides included.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flax import nnx

if TYPE_CHECKING:
    from efftrain.models.config import Attention, BlockConfig, ModelConfig
    from efftrain.models.moe.layer import MoE

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Base of every feed-forward configuration, those of forks too.

    ``build`` returns a module whose call takes and returns (batch, length, d_model), and beside it a dict of
    (sum, count) metrics, empty where there is nothing to say. Where ``reads_tokens``, the call also takes the token ids
    (batch, length); where ``reads_segments``, the segments as ``segments_bt``: (batch, length) integers, 0 is padding;
    None: no token is padding.
    """

    @property
    def independent_tokens(self) -> bool:
        """What becomes of a token does not depend on which others are computed with it."""
        return True

    @property
    def reads_tokens(self) -> bool:
        """The module is called with the ids of the tokens too."""
        return False

    @property
    def reads_segments(self) -> bool:
        """The module is called with the segments too, by which it knows padding."""
        return False

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Base of every encoding of positions into queries and keys, those of forks too.

    ``build`` returns a module with the methods ``queries(q_bthd, positions_bt)`` and ``keys(k_btkd, positions_bt)``,
    which return arrays of the same shape and dtype, (batch, length, heads, d_head). Keys are cached as returned.
    """

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class ScoreModConfig:
    """Base of every modification of attention scores (ALiBi, a soft cap), those of forks too.

    ``build`` returns a module that is called with ``(scores_bhts, heads_h, queries_bt, keys_bs)`` and returns scores of
    the same shape: scaled float32 scores before the mask, the numbers of the heads among all query heads, and the
    positions of queries and keys. It must treat each pair alone, as it also gets parts of a row. Only the backend "xla"
    calls it.
    """

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def score_flops(self, keys: float) -> float | None:
        """FLOPs of a token's scores against ``keys`` keys, all products with parameters apart, forward. None: counted
        from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Base of every attention configuration, those of forks too.

    ``build`` returns a subclass of ``models.attention.AttentionModule``, which lists the calls.

    Attributes:
      quantizes_cache: the module's cache follows ``quantization.cache``; a model that sets it refuses other attention.
    """

    quantizes_cache: ClassVar[bool] = False

    def build(self, model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def empty_cache(self, model: "ModelConfig", batch: int, slots: int) -> Any:
        """What a layer keeps in decoding: a pytree of arrays with an entry for each of ``slots`` tokens a row."""
        raise TypeError(f"{type(self).__name__} has no empty_cache method, so that it cannot be decoded")

    def score_flops(self, keys: float) -> float | None:
        """FLOPs of a token against ``keys`` keys beside the products with parameter matrices, forward. None: counted
        from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Base of how attention and feed-forward part join the residual stream of a block, those of forks too.

    ``build`` returns a ``models.block.Block``, or a subclass that replaces ``join``. Depth policies work around it.
    """

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside attention, feed-forward part and parameter matrices. None: counted from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Base of every depth policy of a block, those of forks too: which tokens pass the block, and how often.

    ``build`` returns a module with the calls of ``models.block.Block``, around what ``block.residual.build`` makes.

    Attributes:
      every_token: every token passes, once, a plain ``Block``: what exits and drafts need of a stack.
    """

    every_token: ClassVar[bool] = False

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def passes(self) -> tuple[float, ...]:
        """The share of a row's tokens that each layer which a token may pass here computes, in order."""
        return (1.0,)

    def empty_cache(self, block: "BlockConfig", model: "ModelConfig", batch: int, slots: int) -> Any:
        """What the block keeps in decoding, for ``slots`` tokens a row; a pytree."""
        return block.attention.empty_cache(model, batch, slots)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base of every router of experts that replaces the learned matrix of ``MoE``, those of forks too.

    ``build`` returns a module that is called with ``(x_btd, tokens_bt, bias_e)`` (states, token ids, and the balancing
    bias that is added to scores for the choice alone) and returns an ``ops.routing.Routing`` of the batch * length
    tokens.
    """

    def build(self, moe: "MoE", d_model: int, *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


def _no_build(config: Any) -> TypeError:
    return TypeError(f"{type(config).__name__} has no build method")
