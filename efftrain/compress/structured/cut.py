"""Structured pruning: slices a model with fewer units, heads, channels, experts and layers out of a trained one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from efftrain.compress.layerwise.calibration import CalibrationSize, idle
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel, assemble
from efftrain.compress.structured.importance import NORMS, Importance, check_prunable
from efftrain.compress.structured.shape import Shape, check_fits, shaped
from efftrain.errors import ConfigError
from efftrain.measure.cost.flops import training_flops
from efftrain.measure.cost.parameters import count_parameters, stored_bytes
from efftrain.models.config import BlockConfig, Dense, ModelConfig, standard_attention
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.moe import MoE
from efftrain.models.quantization import matrices, rule_of
from efftrain.train.checkpoints.flat_state import flatten


@dataclass(frozen=True)
class LayerCut:
    """What is kept of a layer; all numbers are indices in the whole model.

    Attributes:
      layer: index of the layer.
      ffn: the kept FFN units; None if the layer has no dense FFN.
      heads: the kept KV groups, or the kept query heads of a layer with one group.
      experts: the kept experts; None if the layer has none.
      idle_experts: experts, kept or not, that no calibration token reached; their importance is 0, so that they are
        removed first.
    """

    layer: int
    ffn: tuple[int, ...] | None
    heads: tuple[int, ...]
    experts: tuple[int, ...] | None
    idle_experts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Size:
    """The size of a model: number of parameters, bytes of all variables, and model FLOPs per training token."""

    parameters: int
    bytes: int
    training_flops: float

    @staticmethod
    def of(model: Decoder, length: int) -> "Size":
        return Size(count_parameters(model).total, stored_bytes(model), training_flops(model, length))


@dataclass(frozen=True)
class StructuredPruneReport:
    """What structured pruning kept of a model, and the size of the model before and after.

    Attributes:
      hidden: indices of the kept hidden channels, ascending.
      layers: the kept layers, ascending.
      dropped: indices of the removed layers, ascending.
      length: tokens of a row for which FLOPs are counted.
      before, after: size of the model before and after the cut.
      calibration: the amount of text from which the importance was computed.
    """

    hidden: tuple[int, ...]
    layers: tuple[LayerCut, ...]
    dropped: tuple[int, ...]
    length: int
    before: Size
    after: Size
    calibration: CalibrationSize

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def structured_prune(
    pieces: LayerwiseModel, shape: Shape, importance: Importance
) -> tuple[Decoder, StructuredPruneReport]:
    """Structured pruning: keeps the most important parts of a model, in their original order.

    Layers are removed as one contiguous block, the one with the least influence. If hidden channels are removed, a norm
    divides by the root mean square of fewer channels; to correct for that, its scale is multiplied by the ratio of the
    root mean square of the kept channels to that of all channels on the calibration text. Zeros of an earlier pruning
    move with their rows and columns, so that a pattern such as 2:4 is lost: prune weights after the cut.

    Args:
      pieces: the whole model, taken apart; not changed.
      shape: the shape of the smaller model. The FFN units inside of experts are all kept.
      importance: importance of the parts of the whole model.

    Returns:
      The smaller model and a report.

    Raises:
      ConfigError: see ``shaped``, ``kept_layers`` and ``check_prunable``. Also if the quantisation rules would assign
        other rules to the layers of the smaller model, or if a layer of a fork does not get the shapes of its
        configuration.

    Source: Muralidharan et al. 2024 (Minitron), section 2; without the residual of pruned heads.
    """
    config = pieces.config
    check_prunable(config)
    check_fits(config, shape)
    kept = kept_layers(importance, shape.n_layers)
    new = shaped(config, shape, kept)
    _check_rules(config, new, kept)
    hidden = largest(importance.hidden, new.d_model)
    cuts, states = [], []
    for number, block in zip(kept, new.layers, strict=True):
        one_group = standard_attention(config.layers[number], "a smaller shape").n_kv_heads == 1
        cut = _choose(importance, number, block, one_group)
        factors = {name: _correction(importance.moments[f"blocks/{number}/{name}"], hidden) for name in NORMS}
        states.append(_cut(pieces.layers[number], _places(cut, block, hidden, one_group), factors))
        cuts.append(cut)
    factor = {"norm": _correction(importance.moments["norm"], hidden)}
    outer_places = {"embed": hidden, "norm": hidden}
    outer = nnx.merge(nnx.graphdef(pieces.outer), _cut(pieces.outer, outer_places, factor))
    model = assemble(new, outer, states)
    _check_shapes(model, new)
    length = importance.length
    report = StructuredPruneReport(
        hidden=tuple(hidden.tolist()),
        layers=tuple(cuts),
        dropped=tuple(sorted(set(range(config.n_layers)) - set(kept))),
        length=length,
        before=Size.of(abstract_decoder(config), length),
        after=Size.of(model, length),
        calibration=importance.calibration,
    )
    return model, report


def kept_layers(importance: Importance, n_layers: int) -> tuple[int, ...]:
    """Indices of the layers that are kept when the contiguous block of layers with the least influence is removed.

    The first and the last layer are always kept.

    Args:
      importance: importance of the parts of the whole model.
      n_layers: number of layers that are kept.

    Raises:
      ConfigError: so few layers are to be kept that the first or the last one would be removed.

    Source: Muralidharan et al. 2024 (Minitron), on contiguous blocks; Men et al. 2024 (ShortGPT), on influence.
    """
    n = len(importance.heads)
    n_dropped = n - n_layers
    if not n_dropped:
        return tuple(range(n))
    if n_layers < 2:
        raise ConfigError(
            f"shape.n_layers is {n_layers} of {n}, and the first and the last layer are never removed; keep "
            f"at least {min(2, n)}"
        )
    first = min(range(1, n - n_dropped), key=lambda i: importance.block_influence(i, n_dropped))
    return (*range(first), *range(first + n_dropped, n))


def largest(importance: np.ndarray, n: int) -> np.ndarray:
    """Indices of the n largest values, ascending; of equal values the first are taken."""
    return np.sort(np.argsort(-importance, kind="stable")[:n])


def _choose(importance: Importance, number: int, block: BlockConfig, one_group: bool) -> LayerCut:
    """Chooses what is kept of a layer.

    Args:
      importance: importance of the parts of the whole model.
      number: index of the layer.
      block: configuration of the layer after the cut.
      one_group: whether the whole layer has a single KV group, so that query heads are cut.
    """

    def places(scores: np.ndarray | None, n: int) -> tuple[int, ...]:
        assert scores is not None  # the layer has such parts
        return tuple(largest(scores, n).tolist())

    mlp, attention = block.mlp, standard_attention(block, "a smaller shape")
    experts = importance.experts[number]
    return LayerCut(
        layer=number,
        ffn=places(importance.ffn[number], mlp.d_ff) if isinstance(mlp, Dense) else None,
        heads=places(importance.heads[number], attention.n_heads if one_group else attention.n_kv_heads),
        experts=places(experts, mlp.n_experts) if isinstance(mlp, MoE) else None,
        idle_experts=() if experts is None else idle(experts),
    )


def _places(cut: LayerCut, block: BlockConfig, hidden: np.ndarray, one_group: bool) -> dict[str, np.ndarray]:
    """For each logical axis that is cut, the indices of the units that are kept."""
    attention = standard_attention(block, "a smaller shape")
    heads = np.array(cut.heads)
    places = {"embed": hidden, "norm": hidden}
    places["heads"] = heads if one_group else _columns(heads, attention.n_heads // attention.n_kv_heads)
    if not one_group:
        places["kv_heads"] = heads
    if cut.ffn is not None:
        places["mlp"] = np.array(cut.ffn)
    if cut.experts is not None:
        places |= {"experts": np.array(cut.experts), "choices": np.array(cut.experts)}
    return places


def _columns(units: np.ndarray, size: int) -> np.ndarray:
    """The indices of the columns of some units, each of ``size`` columns."""
    return (units[:, None] * size + np.arange(size)).reshape(-1)


def _cut(module: nnx.Module, places: Mapping[str, np.ndarray], factors: Mapping[str, float]) -> nnx.State:
    """The sliced state of a layer or of the outer part; scales of norms are multiplied by ``factors``, by name."""
    flat = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if path[0] == "blocks":  # the outer part has blocks without arrays
            flat.append((path, variable))
            continue
        value = np.asarray(variable[...])  # on the host, because JAX would compile a program for each shape
        metadata = variable.get_metadata()
        n_units = metadata.get("units", value.shape)
        for axis, (name, n) in enumerate(zip(metadata["axes"], n_units, strict=True)):
            if name in places:
                value = np.take(value, _columns(places[name], value.shape[axis] // n), axis=axis)
        if (part := str(path[0])) in factors:
            value = value * np.float32(factors[part])
        flat.append((path, variable.replace(jnp.asarray(value))))
    return nnx.from_flat_state(flat)


def _correction(moments: np.ndarray, hidden: np.ndarray) -> float:
    """The factor for a norm's scale: the root mean square of the kept channels over that of all channels."""
    return float(np.sqrt(moments[hidden].mean() / max(moments.mean(), 1e-30))) if len(hidden) < len(moments) else 1.0


def _check_rules(config: ModelConfig, new: ModelConfig, kept: Sequence[int]) -> None:
    """Raises an error if a kept layer gets other rules: rules name positions in the pattern, which may have changed."""
    if not config.quantization.rules:
        return
    old, rules = _rules(config), _rules(new)
    for i, number in enumerate(kept):
        if rules[i] != old[number]:
            raise ConfigError(
                f"quantization.rules gives layer {number} another rule when layers are dropped; use rules that do not "
                "name positions in the pattern, such as blocks/.*"
            )


def _rules(config: ModelConfig) -> list[dict[str, Any]]:
    """The quantisation rules of each layer's matrices."""
    positions = [
        {name: rule_of(getattr(module, attribute)) for name, module, attribute in matrices(stack)}
        for stack in abstract_decoder(config).blocks
    ]
    return positions * config.n_repeats


def _check_shapes(model: Decoder, config: ModelConfig) -> None:
    wanted = flatten(nnx.state(abstract_decoder(config)))
    for name, leaf in flatten(nnx.state(model)).items():
        if leaf.shape != wanted[name].shape:
            raise ConfigError(
                f"{name} has the shape {leaf.shape} after the cut and {wanted[name].shape} in the smaller model; give "
                "its axes the logical names that efftrain.models uses, and other names to axes that are not cut"
            )
