"""Base classes of the components of a block: small configurations that build a module.

A fork derives its own components from them. The docstring of each base class says how the built module is called;
``recipes/README.md`` lists all places for own components. A variable of such a module has the metadata ``axes``, a
logical name for each dimension (``sharding.rules``); the name None keeps a dimension whole.

A component may state its FLOPs. Products with parameter matrices are counted from the parameters; the ``..._flops``
method of a base class states the other products of a token. If it returns None, ``measure.cost.flops`` traces the
module and counts them, including those that a mask hides.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from flax import nnx
from jax import Array

if TYPE_CHECKING:
    from efftrain.models.attention import AttentionModule
    from efftrain.models.block import Block, Layer
    from efftrain.models.config import Attention, BlockConfig, ModelConfig
    from efftrain.models.moe.layer import MoE

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Base class of feed-forward configurations; a fork derives its own from it.

    ``build`` returns a module whose call takes (batch, length, d_model), and returns the same shape and a dict of
    (sum, count) metrics, which may be empty. If ``reads_tokens``, the call also takes the token ids (batch, length). If
    ``reads_segments``, it takes the segments as ``segments_bt``: (batch, length) integers, where 0 is padding; None: no
    token is padding.
    """

    @property
    def independent_tokens(self) -> bool:
        """Whether the result for a token is independent of the other tokens that are computed with it."""
        return True

    @property
    def reads_tokens(self) -> bool:
        """Whether the module is called with the token ids too."""
        return False

    @property
    def reads_segments(self) -> bool:
        """Whether the module is called with the segments too, which show it the padding."""
        return False

    def build(self, d_model: int, *, n_layers: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


class PositionModule(Protocol):
    """The module of a ``PositionConfig``. Its methods return arrays of the same shape and dtype."""

    def queries(self, q_bthd: Array, positions_bt: Array, /) -> Array: ...

    def keys(self, k_btkd: Array, positions_bt: Array, /) -> Array: ...


@dataclass(frozen=True, kw_only=True)
class PositionConfig:
    """Base class of encodings of positions into queries and keys; a fork derives its own from it.

    ``build`` returns a module with the methods ``queries(q_bthd, positions_bt)`` and ``keys(k_btkd, positions_bt)``,
    which return arrays of the same shape and dtype, (batch, length, heads, d_head). Keys are cached as returned.
    """

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> PositionModule:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class ScoreModConfig:
    """Base class of modifications of attention scores (ALiBi, a soft cap); a fork derives its own from it.

    ``build`` returns a module that is called with ``(scores_bhts, heads_h, queries_bt, keys_bs)`` and returns scores of
    the same shape. The arguments are the scaled float32 scores before the mask, the indices of the heads among all
    query heads, and the positions of queries and keys. The module must treat each query-key pair independently, because
    it also gets parts of a row. Only the backend "xla" calls it.
    """

    def build(self, attention: "Attention", model: "ModelConfig", *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def score_flops(self, keys: float) -> float | None:
        """FLOPs of a token's scores against ``keys`` keys, forward, without products with parameters.

        None: counted from a trace.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Base class of attention configurations; a fork derives its own from it.

    ``build`` returns a subclass of ``models.attention.AttentionModule``, which lists the calls.

    Attributes:
      quantizes_cache: whether the module's cache follows ``quantization.cache``. A model that sets
        ``quantization.cache`` accepts no other attention.
    """

    quantizes_cache: ClassVar[bool] = False

    def build(self, model: "ModelConfig", *, rngs: nnx.Rngs) -> "AttentionModule":
        raise _no_build(self)

    def empty_cache(self, model: "ModelConfig", batch: int, slots: int) -> Any:
        """Returns the empty cache of a layer: a pytree of arrays with ``slots`` entries, one per token, in each row."""
        raise TypeError(f"{type(self).__name__} has no empty_cache method, so that it cannot be decoded")

    def score_flops(self, keys: float) -> float | None:
        """FLOPs of a token against ``keys`` keys, forward, without products with parameter matrices.

        None: counted from a trace.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Base class of the norms of a model; a fork derives its own from it.

    ``build`` returns a module that maps (..., size) to the same shape and dtype. Its variables have the logical axis
    ``axis``, which consists of ``units`` indivisible pieces.
    """

    def build(self, size: int, *, eps: float, axis: str = "norm", units: int | None = None) -> nnx.Module:
        raise _no_build(self)

    def of_heads(self) -> "NormConfig":
        """Returns the configuration of the norms of queries and keys."""
        return self


@dataclass(frozen=True, kw_only=True)
class ResidualConfig:
    """Base class of the ways in which attention and feed-forward part join the residual stream of a block.

    A fork derives its own from it. ``build`` returns a ``models.block.Block``, or a subclass with another
    ``join``. Depth policies wrap the built block.
    """

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> "Block":
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside attention, feed-forward part and parameter matrices. None: counted from a trace."""
        return None


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """Base class of depth policies (which tokens pass a block, and how often); a fork derives its own from it.

    ``build`` returns a ``models.block.Layer``, around the block that ``block.residual.build`` builds.

    Attributes:
      every_token: every token passes a plain ``Block`` exactly once, which early exits and drafts need of a stack.
    """

    every_token: ClassVar[bool] = False

    def build(self, block: "BlockConfig", model: "ModelConfig", *, rngs: nnx.Rngs) -> "Layer":
        raise _no_build(self)

    def passes(self) -> tuple[float, ...]:
        """For each layer that a token may pass in this block, in order: the share of a row's tokens it computes."""
        return (1.0,)

    def empty_cache(self, block: "BlockConfig", model: "ModelConfig", batch: int, slots: int) -> Any:
        """Returns the empty cache of the block for ``slots`` tokens per row; a pytree."""
        return block.attention.empty_cache(model, batch, slots)


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Base class of expert routers that replace the learned matrix of ``MoE``; a fork derives its own from it.

    ``build`` returns a module that is called with ``(x_btd, tokens_bt, bias_e)`` and returns an ``ops.routing.Routing``
    of the batch * length tokens. The arguments are the states, the token ids, and the balancing bias, which is added to
    the scores only for the choice of experts.
    """

    def build(self, moe: "MoE", d_model: int, *, rngs: nnx.Rngs) -> nnx.Module:
        raise _no_build(self)

    def other_flops(self) -> float | None:
        """FLOPs of a token beside the products with parameter matrices, forward. None: counted from a trace."""
        return None


def _no_build(config: Any) -> TypeError:
    return TypeError(f"{type(config).__name__} has no build method")
