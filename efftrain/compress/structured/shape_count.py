"""How many parameters or FLOPs a smaller shape of a model has, counted without building it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from flax import nnx

from efftrain.compress.structured.shape import Shape, check_fits, cut_block, multiple_of, part
from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, attention_flops, head_flops, mean_visible_keys
from efftrain.measure.cost.parameters import HEAD, embedding_paths, parameters, passes
from efftrain.models.config import BlockConfig, Dense, ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.moe import MoE

By = Literal["parameters", "flops"]
Term = tuple[float, tuple[tuple[str | None, int], ...]]  # a factor, and the name and size of each axis


class Count:
    """Parameters of any shape of a model, or model FLOPs of a training token, without building it.

    Every matrix counts by its logical axes, as ``slim`` slices them.

    Args:
      config: of the whole model.
      by: what is counted.
      length: tokens of a row, for FLOPs.
    """

    def __init__(self, config: ModelConfig, by: By, length: int):
        self.config, self.by, self.length, self.multiple = config, by, length, multiple_of(config)
        abstract = abstract_decoder(config)
        free = set() if by == "parameters" else embedding_paths(abstract) | {HEAD}
        self.outer: list[Term] = []
        self.blocks: list[list[Term]] = [[] for _ in config.pattern]
        for path, variable in parameters(abstract):
            if path[:-1] not in free and (term := _term(variable, by)) is not None:
                (self.blocks[path[1]] if path[0] == "blocks" else self.outer).append(term)
        if by == "flops":
            self.outer.append((head_flops(abstract) / config.d_model, (("embed", config.d_model),)))

    def of(self, shape: Shape) -> float:
        """Of one shape; where layers differ and some go, for the position in the stack at which most is left."""
        check_fits(self.config, shape)
        outer, layers = self.parts(shape.d_model, shape.heads, [shape.experts], [shape.ffn])
        return float(self.total(outer, layers, shape.n_layers)[0, 0])

    def parts(
        self, d_model: int, heads: float, experts: Sequence[float], ffn: Sequence[float]
    ) -> tuple[float, np.ndarray]:
        """Of what is around the layers; and of one layer, (pattern positions, experts, ffn) for each pair of shares."""
        d_model = part(d_model / self.config.d_model, self.config.d_model, self.multiple)
        whole = replace(Shape.of(self.config), heads=heads)
        layers = np.zeros((len(self.blocks), len(experts), len(ffn)))
        for i, (block, terms) in enumerate(zip(self.config.pattern, self.blocks, strict=True)):
            units, choices = np.zeros(0), np.zeros(0)
            if isinstance(block.mlp, Dense):
                units = [cut_block(block, replace(whole, ffn=s), self.multiple).mlp.d_ff for s in ffn]
            if isinstance(block.mlp, MoE):
                cut = [cut_block(block, replace(whole, experts=s), self.multiple) for s in experts]
                choices = [b.mlp.n_experts for b in cut]
            block = cut_block(block, whole, self.multiple)
            sizes = _sizes(block, d_model, np.array(units, float), np.array(choices, float)[:, None])
            layers[i] = _sum(terms, sizes)
            if self.by == "flops":
                keys = mean_visible_keys(self.length, block.attention.window)
                layers[i] += attention_flops(block.attention, keys)
        factor = FORWARD_AND_BACKWARD if self.by == "flops" else 1
        return factor * _sum(self.outer, {"embed": d_model, "norm": d_model}), factor * layers

    def total(self, outer: float, layers: np.ndarray, n_layers: int) -> np.ndarray:
        """(experts, ffn) of ``parts`` with so many layers left."""
        n, n_positions = self.config.n_layers, len(self.blocks)
        dropped = n - n_layers
        firsts = range(1, min(n - dropped, n_positions + 1)) if dropped else [0]  # of a longer stack the same again
        left = [[*range(first), *range(first + dropped, n)] for first in firsts]
        counts = np.array([np.bincount(np.array(kept) % n_positions, minlength=n_positions) for kept in left])
        return outer + np.tensordot(counts, layers, 1).max(0)


def _term(variable: nnx.Variable, by: By) -> Term | None:
    """Of one variable of a layer, whose product of sizes is multiplied with the factor."""
    metadata = variable.get_metadata()
    axes = [pair for pair in zip(metadata["axes"], variable.shape, strict=True) if pair[0] != "layers"]
    if by == "parameters":
        return 1.0, tuple(axes)
    if len(axes) < 2:
        return None
    active = metadata.get("active", 1.0)
    if active < 1:  # a token goes to as many experts of fewer
        axes = [(None if name == "experts" else name, size) for name, size in axes]
    return 2.0 * active * passes(variable), tuple(axes)


def _sizes(block: BlockConfig, d_model: int, units: np.ndarray, choices: np.ndarray) -> dict[str, int | np.ndarray]:
    """For each logical axis that ``slim`` cuts, what is left of it."""
    attention = block.attention
    sizes = {"embed": d_model, "norm": d_model}
    sizes |= {"heads": attention.n_heads * attention.d_head, "kv_heads": attention.n_kv_heads * attention.d_head}
    if units.size:
        sizes["mlp"] = units
    if choices.size:
        sizes |= {"experts": choices, "choices": choices}
    return sizes


def _sum(terms: Sequence[Term], sizes: dict[str, int | np.ndarray]) -> float | np.ndarray:
    total = 0.0
    for factor, axes in terms:
        for name, size in axes:
            factor = factor * sizes.get(name, size)
        total = total + factor
    return total
