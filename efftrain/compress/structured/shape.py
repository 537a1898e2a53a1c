"""The shape of a structurally pruned model, and the configuration that follows from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from efftrain.errors import ConfigError
from efftrain.models.config import Attention, BlockConfig, Dense, ModelConfig, standard_attention
from efftrain.models.moe import MoE


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The size of what is kept of a model.

    Attributes:
      d_model: number of hidden channels that are kept; rounded to a multiple of ``multiple_of``.
      ffn: share of the units of every ``Dense`` layer that is kept; rounded to the same multiple.
      heads: share of the KV groups of every layer, with their query heads, that is kept; rounded. In a layer with one
        group (MQA), the share of its query heads.
      experts: share of the routed experts of every ``MoE`` layer that is kept; rounded, but never fewer than the
        ``top_k`` that a token uses.
      n_layers: number of layers that are kept.
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
        """The shape of the whole model."""
        return Shape(d_model=config.d_model, ffn=1.0, heads=1.0, experts=1.0, n_layers=config.n_layers)


def multiple_of(config: ModelConfig) -> int:
    """The number whose multiples the sizes of hidden channels and FFN units are, for the accelerator's tiles."""
    return 64 if config.d_model >= 512 else 8


def shaped(config: ModelConfig, shape: Shape, kept_layers: Sequence[int]) -> ModelConfig:
    """The configuration of the smaller model, with the shortest pattern that repeats to its layers.

    Args:
      config: configuration of the whole model.
      shape: shape of the smaller model.
      kept_layers: indices of the ``shape.n_layers`` layers that are kept, ascending.

    Raises:
      ConfigError: the shape is larger than the model, leaves a layer empty, or cuts parts that no layer has.
    """
    check_fits(config, shape)
    if len(kept_layers) != shape.n_layers:
        raise ConfigError(f"shape.n_layers is {shape.n_layers} and {len(kept_layers)} layers are kept; make them equal")
    multiple = multiple_of(config)
    d_model = part(shape.d_model / config.d_model, config.d_model, multiple)
    if not d_model:
        raise ConfigError(f"shape.d_model is {shape.d_model}, less than half a multiple of {multiple}; use {multiple}")
    layers = tuple(cut_block(config.layers[i], shape, multiple) for i in kept_layers)
    period = next(p for p in range(1, len(layers) + 1) if layers == layers[:p] * (len(layers) // p))
    return config.replace(d_model=d_model, pattern=layers[:period], n_repeats=len(layers) // period)


def check_fits(config: ModelConfig, shape: Shape) -> None:
    """Raises ``ConfigError`` if a shape exceeds the model, leaves a layer empty, or cuts parts that no layer has."""
    for name in ("d_model", "n_layers"):
        if (size := getattr(shape, name)) > (whole := getattr(config, name)):
            raise ConfigError(f"shape.{name} is {size} and the model has {whole}; give at most {whole}")
    for name, kind in (("ffn", Dense), ("experts", MoE)):
        if getattr(shape, name) < 1 and not any(isinstance(block.mlp, kind) for block in config.pattern):
            raise ConfigError(f"shape.{name} is {getattr(shape, name)} and no layer has {kind.__name__}; leave it at 1")
    multiple = multiple_of(config)
    if shape.d_model < config.d_model == part(shape.d_model / config.d_model, config.d_model, multiple):
        smaller = (config.d_model - 1) // multiple * multiple
        advice = f"use {smaller}" if smaller else f"leave it at {config.d_model}"
        raise ConfigError(f"shape.d_model is {shape.d_model}, which rounds to all {config.d_model} channels; {advice}")
    for name in ("ffn", "heads", "experts"):
        _check_share(config, name, getattr(shape, name))


def cut_block(block: BlockConfig, shape: Shape, multiple: int) -> BlockConfig:
    """The configuration of a block after the cut, for a shape that was checked by ``check_fits``."""
    attention, mlp = standard_attention(block, "a smaller shape"), block.mlp
    heads = _left(block, "heads", multiple, shape.heads)
    if attention.n_kv_heads > 1:
        queries = attention.n_heads // attention.n_kv_heads
        attention = replace(attention, n_heads=heads * queries, n_kv_heads=heads)
    else:
        attention = replace(attention, n_heads=heads)
    if isinstance(mlp, Dense):
        mlp = replace(mlp, d_ff=_left(block, "ffn", multiple, shape.ffn))
    elif isinstance(mlp, MoE):
        mlp = replace(mlp, n_experts=_left(block, "experts", multiple, shape.experts))
    return replace(block, attention=attention, mlp=mlp)


def _left(block: BlockConfig, name: str, multiple: int, share: float) -> int:
    parts = _parts(block, name, multiple)
    assert parts is not None  # the caller asks for what the block has
    return parts.left(share)


def head_parts(attention: Attention) -> int:
    """The number that ``Shape.heads`` is a share of: KV groups, or query heads if there is only one group."""
    return attention.n_kv_heads if attention.n_kv_heads > 1 else attention.n_heads


def part(share: float, size: int, multiple: int = 1) -> int:
    """A share of a size, rounded to a multiple of ``multiple``; a share of 1 is the size itself, without rounding."""
    return size if share == 1 else min(math.floor(share * size / multiple + 0.5) * multiple, size)


@dataclass(frozen=True)
class _Parts:
    """Parts of a layer, such as heads, of which a multiple of ``multiple`` and at least ``least`` are kept."""

    what: str
    size: int
    multiple: int = 1
    least: int = 0

    def left(self, share: float) -> int:
        return max(part(share, self.size, self.multiple), self.least)


def _parts(block: BlockConfig, name: str, multiple: int) -> _Parts | None:
    """The parts that a field of ``Shape`` is a share of; None if the block has no such parts."""
    mlp = block.mlp
    if name == "heads":
        attention = standard_attention(block, "a smaller shape")
        return _Parts("KV groups" if attention.n_kv_heads > 1 else "query heads", head_parts(attention))
    if name == "ffn":
        return _Parts("units", mlp.d_ff, multiple) if isinstance(mlp, Dense) else None
    return _Parts("experts", mlp.n_experts, least=mlp.top_k) if isinstance(mlp, MoE) else None


def _check_share(config: ModelConfig, name: str, share: float) -> None:
    """Raises an error for a share that leaves a layer empty or cuts nothing; it names the nearest share that works."""
    found = {i: _parts(block, name, multiple_of(config)) for i, block in enumerate(config.pattern)}
    parts = {i: p for i, p in found.items() if p is not None}

    def empty(share: float) -> list[int]:
        return [i for i, p in parts.items() if not p.left(share)]

    def cuts(share: float) -> bool:
        return any(p.left(share) < p.size for p in parts.values())

    if share == 1 or (not empty(share) and cuts(share)):
        return
    steps = {n / p.size for p in parts.values() for n in range(p.multiple, p.size, p.multiple)}
    written = [math.ceil(1000 * step) / 1000 for step in steps]
    working = [step for step in written if step < 1 and not empty(step) and cuts(step)]
    nearest = min(working, key=lambda step: abs(step - share), default=None)
    if left_empty := empty(share):
        p = parts[left_empty[0]]
        reason = f"leaves layer {left_empty[0]} none of its {p.size} {p.what}"
    else:
        p = max(parts.values(), key=lambda p: p.size)
        reason = f"cuts none of a layer's {p.size} {p.what}"
    advice = "leave it at 1" if nearest is None else f"use {nearest:g}"
    raise ConfigError(f"shape.{name} is {share:g}, which {reason}; {advice}")
