"""The shape of a smaller model, and its configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from efftrain.errors import ConfigError
from efftrain.models.config import BlockConfig, Dense, ModelConfig, standard_attention
from efftrain.models.moe import MoE


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is left of a model.

    Attributes:
      d_model: hidden channels, rounded to a multiple of ``multiple_of``.
      ffn: the share of every ``Dense`` layer's units, rounded so too.
      heads: the share of every layer's KV groups, with their queries.
      experts: the share of every ``MoE`` layer's routed experts; never fewer than a token uses.
      n_layers: layers.
    """

    d_model: int
    ffn: float
    heads: float
    experts: float
    n_layers: int

    def __post_init__(self):
        for name in ("ffn", "heads", "experts"):
            if not 0 < (share := getattr(self, name)) <= 1:
                raise ConfigError(f"shape.{name} is {share}; give a share above 0 and at most 1")
        for name in ("d_model", "n_layers"):
            if (size := getattr(self, name)) < 1:
                raise ConfigError(f"shape.{name} is {size}; keep at least 1")

    @staticmethod
    def of(config: ModelConfig) -> "Shape":
        """The whole model."""
        return Shape(d_model=config.d_model, ffn=1.0, heads=1.0, experts=1.0, n_layers=config.n_layers)


def multiple_of(config: ModelConfig) -> int:
    """Hidden channels and units are kept in multiples of it, for the accelerator's tiles."""
    return 64 if config.d_model >= 512 else 8


def shaped(config: ModelConfig, shape: Shape, kept_layers: Sequence[int]) -> ModelConfig:
    """The configuration of the smaller model, in the shortest pattern that it repeats.

    Args:
      config: of the whole model.
      shape: of the smaller one.
      kept_layers: the ``shape.n_layers`` that are left, ascending.

    Raises:
      ConfigError: the shape is larger than the model, empties a layer, or cuts what no layer has.
    """
    check_fits(config, shape)
    if len(kept_layers) != shape.n_layers:
        raise ConfigError(f"shape.n_layers is {shape.n_layers} and {len(kept_layers)} layers are kept; make them equal")
    multiple = multiple_of(config)
    d_model = part(shape.d_model / config.d_model, config.d_model, multiple)
    if not d_model:
        raise ConfigError(f"shape.d_model is {shape.d_model}, less than half a multiple of {multiple}; use {multiple}")
    layers = tuple(cut_block(config.layers[i], shape, multiple, f"layer {i}") for i in kept_layers)
    period = next(p for p in range(1, len(layers) + 1) if layers == layers[:p] * (len(layers) // p))
    return config.replace(d_model=d_model, pattern=layers[:period], n_repeats=len(layers) // period)


def check_fits(config: ModelConfig, shape: Shape) -> None:
    """Raises ``ConfigError`` where a shape is larger than the model, or cuts what no layer has."""
    for name in ("d_model", "n_layers"):
        if (size := getattr(shape, name)) > (whole := getattr(config, name)):
            raise ConfigError(f"shape.{name} is {size} and the model has {whole}; give at most {whole}")
    for name, kind in (("ffn", Dense), ("experts", MoE)):
        if getattr(shape, name) < 1 and not any(isinstance(block.mlp, kind) for block in config.pattern):
            raise ConfigError(f"shape.{name} is {getattr(shape, name)} and no layer has {kind.__name__}; leave it at 1")


def cut_block(block: BlockConfig, shape: Shape, multiple: int, name: str) -> BlockConfig:
    """A block with the shape's shares; ``name`` is for errors, see ``shaped``."""
    attention, mlp = standard_attention(block, "a smaller shape"), block.mlp
    groups = _not_empty(name, "heads", "KV groups", shape.heads, attention.n_kv_heads, 1)
    queries = attention.n_heads // attention.n_kv_heads
    if isinstance(mlp, Dense):
        mlp = replace(mlp, d_ff=_not_empty(name, "ffn", "units", shape.ffn, mlp.d_ff, multiple))
    elif isinstance(mlp, MoE):
        mlp = replace(mlp, n_experts=max(part(shape.experts, mlp.n_experts), mlp.top_k))
    return replace(block, attention=replace(attention, n_heads=groups * queries, n_kv_heads=groups), mlp=mlp)


def part(share: float, size: int, multiple: int = 1) -> int:
    """The share of a size, rounded to a multiple of ``multiple``; the whole is never rounded."""
    return size if share == 1 else min(math.floor(share * size / multiple + 0.5) * multiple, size)


def _not_empty(name: str, field: str, what: str, share: float, size: int, multiple: int) -> int:
    kept = part(share, size, multiple)
    if not kept:
        least = math.ceil(500 * multiple / size) / 1000
        raise ConfigError(f"shape.{field} is {share}, which leaves {name} none of its {size} {what}; use {least:g}")
    return kept
