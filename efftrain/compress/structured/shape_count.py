"""Counts the parameters or the FLOPs of smaller shapes of a model, without building them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from flax import nnx

from efftrain.compress.structured.shape import Shape, check_fits, cut_block, multiple_of, part
from efftrain.measure.cost.flops import FORWARD_AND_BACKWARD, attention_flops, head_flops, mean_visible_keys
from efftrain.measure.cost.parameters import HEAD, embedding_paths, parameters, passes
from efftrain.models.config import BlockConfig, Dense, ModelConfig, standard_attention
from efftrain.models.decoder import abstract_decoder
from efftrain.models.moe import MoE

CountedMetric = Literal["parameters", "flops"]
Term = tuple[float, tuple[tuple[str | None, int], ...]]  # a factor, and the logical name and size of each axis


class Count:
    """Counts the parameters, or the model FLOPs per training token, of any smaller shape of a model.

    Every matrix is counted by its logical axes, in the way in which ``structured_prune`` slices them.

    Args:
      config: configuration of the whole model.
      metric: what is counted: "parameters" or "flops".
      length: tokens of a row, for FLOPs.
    """

    def __init__(self, config: ModelConfig, metric: CountedMetric, length: int):
        self.config, self.metric, self.length, self.multiple = config, metric, length, multiple_of(config)
        abstract = abstract_decoder(config)
        free = set() if metric == "parameters" else embedding_paths(abstract) | {HEAD}
        self.outer: list[Term] = []
        self.blocks: list[list[Term]] = [[] for _ in config.pattern]
        for path, variable in parameters(abstract):
            if path[:-1] not in free and (term := _term(variable, metric)) is not None:
                (self.blocks[path[1]] if path[0] == "blocks" else self.outer).append(term)
        if metric == "flops":
            self.outer.append((head_flops(abstract) / config.d_model, (("embed", config.d_model),)))

    def of(self, shape: Shape) -> float:
        """The count of one shape.

        If layers differ and some are removed, the count depends on which ones; then it is the largest possible.
        """
        check_fits(self.config, shape)
        outer, layers = self.parts(shape.d_model, shape.heads, [shape.experts], [shape.ffn])
        return float(self.total(outer, layers, shape.n_layers)[0, 0])

    def parts(
        self, d_model: int, heads: float, experts: Sequence[float], ffn: Sequence[float]
    ) -> tuple[float, np.ndarray]:
        """Counts the outer part and the layers separately, for several shares of experts and FFN units.

        Returns:
          The count of the outer part, and that of one layer at each position of the pattern, as an array (pattern
          positions, shares of experts, shares of ffn).
        """
        d_model = part(d_model / self.config.d_model, self.config.d_model, self.multiple)
        whole = replace(Shape.of(self.config), heads=heads)
        layers = np.zeros((len(self.blocks), len(experts), len(ffn)))
        for i, (block, terms) in enumerate(zip(self.config.pattern, self.blocks, strict=True)):
            units, choices = np.zeros(0), np.zeros(0)
            if isinstance(block.mlp, Dense):
                cut = [cut_block(block, replace(whole, ffn=s), self.multiple).mlp for s in ffn]
                units = [mlp.d_ff for mlp in cut if isinstance(mlp, Dense)]
            if isinstance(block.mlp, MoE):
                cut = [cut_block(block, replace(whole, experts=s), self.multiple).mlp for s in experts]
                choices = [mlp.n_experts for mlp in cut if isinstance(mlp, MoE)]
            block = cut_block(block, whole, self.multiple)
            sizes = _sizes(block, d_model, np.array(units, float), np.array(choices, float)[:, None])
            layers[i] = _sum(terms, sizes)
            if self.metric == "flops":
                attention = standard_attention(block, "a smaller shape")
                layers[i] += attention_flops(attention, mean_visible_keys(self.length, attention.window))
        factor = FORWARD_AND_BACKWARD if self.metric == "flops" else 1
        return factor * float(_sum(self.outer, {"embed": d_model, "norm": d_model})), factor * layers

    def total(self, outer: float, layers: np.ndarray, n_layers: int) -> np.ndarray:
        """The count of whole models with ``n_layers`` layers, (experts, ffn), from the results of ``parts``."""
        n, n_positions = self.config.n_layers, len(self.blocks)
        dropped = n - n_layers
        firsts = range(1, min(n - dropped, n_positions + 1)) if dropped else [0]  # positions repeat after a pattern
        left = [[*range(first), *range(first + dropped, n)] for first in firsts]
        counts = np.array([np.bincount(np.array(kept) % n_positions, minlength=n_positions) for kept in left])
        return outer + np.tensordot(counts, layers, 1).max(0)


def _term(variable: nnx.Variable, metric: CountedMetric) -> Term | None:
    """The term of one variable: its count is the factor times the product of the units. None: nothing is counted."""
    metadata = variable.get_metadata()
    n_units = metadata.get("units", variable.shape)
    axes = [pair for pair in zip(metadata["axes"], n_units, strict=True) if pair[0] != "layers"]
    columns = float(np.prod([size // n for size, n in zip(variable.shape, n_units, strict=True)]))  # of all units
    if metric == "parameters":
        return columns, tuple(axes)
    if len(axes) < 2:
        return None
    active = metadata.get("active", 1.0)
    if active < 1:  # a token uses the same number of experts when there are fewer, so that this axis is not scaled
        axes = [(None if name == "experts" else name, n) for name, n in axes]
    return 2.0 * active * passes(variable) * columns, tuple(axes)


def _sizes(block: BlockConfig, d_model: int, units: np.ndarray, choices: np.ndarray) -> dict[str, int | np.ndarray]:
    """The number of units of each logical axis that ``structured_prune`` cuts, after the cut."""
    attention = standard_attention(block, "a smaller shape")
    sizes: dict[str, int | np.ndarray] = {"embed": d_model, "norm": d_model}
    sizes |= {"heads": attention.n_heads, "kv_heads": attention.n_kv_heads}
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
