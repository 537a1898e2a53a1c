"""Layers of different widths, filled up with zeros to one width, as architectures with one width for all layers ask."""

from dataclasses import replace
from typing import Any

import jax
from flax import nnx

from efftrain.errors import ConfigError
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.moe.layer import MoE

WIDTH = {Dense: "d_ff", MoE: "d_expert"}  # the hidden units of a feed-forward part or of an expert


def of_one_width(config: ModelConfig) -> ModelConfig:
    """Returns the configuration in which all layers have the hidden units and the heads of the widest one.

    A model computes the same if its additional units and heads are zeros, because every activation of 0 is 0, and what
    a head of zeros returns is multiplied with zeros.

    Raises:
      ConfigError: zeros would change what the model computes.
    """
    blocks = config.pattern
    for kind, name in WIDTH.items():
        if all(isinstance(block.mlp, kind) for block in blocks):
            widest: dict[str, Any] = {name: max(getattr(block.mlp, name) for block in blocks)}
            blocks = tuple(replace(block, mlp=replace(block.mlp, **widest)) for block in blocks)
    return config.replace(pattern=_with_heads(blocks))


def _with_heads(blocks: tuple[BlockConfig, ...]) -> tuple[BlockConfig, ...]:
    parts = [block.attention for block in blocks]
    attentions = [part for part in parts if isinstance(part, Attention)]
    heads = {(attention.n_heads, attention.n_kv_heads) for attention in attentions}
    if len(attentions) < len(parts) or len(heads) == 1:
        return blocks
    n_heads, n_kv_heads = max(heads)
    grouped = len({n // kv for n, kv in heads}) == 1  # a query head finds its KV head by its number
    if not grouped and {kv for _, kv in heads} != {1}:
        raise ConfigError(
            f"attention.n_heads and n_kv_heads are {' and '.join(f'{n}/{kv}' for n, kv in sorted(heads))} in different "
            "layers, and heads of zeros keep their order only if all layers have the same number of query heads per KV "
            "head"
        )
    if any(attention.qk_norm == "full" for attention in attentions):
        raise ConfigError(
            "attention.qk_norm is 'full', a norm over all heads, and attention.n_heads differs between layers: heads "
            "of zeros would change what it divides by"
        )
    return tuple(
        replace(block, attention=replace(attention, n_heads=n_heads, n_kv_heads=n_kv_heads))
        for block, attention in zip(blocks, attentions, strict=True)
    )


def share_of_zeros(config: ModelConfig, filled: ModelConfig) -> float:
    """Returns the share of the numbers of ``filled`` that ``config`` does not have."""

    def size(config: ModelConfig) -> int:
        return sum(x.size for x in jax.tree.leaves(nnx.state(abstract_decoder(config))))

    return 1 - size(config) / size(filled)
