"""Search for the shapes of smaller models that have a given share of the parameters or of the FLOPs."""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from efftrain.compress.structured.importance import check_prunable
from efftrain.compress.structured.shape import Shape, head_parts, multiple_of, part
from efftrain.compress.structured.shape_count import Count, CountedMetric
from efftrain.errors import ConfigError
from efftrain.models.config import Dense, ModelConfig, standard_attention
from efftrain.models.moe import MoE

Axis = Literal["width", "depth", "any"]
NEAR = 0.96  # smallest share of the target count that still counts as near it
LEAST_FFN = 0.25  # smallest share of the FFN units that is tried
# How much a cut of each kind hurts, as a factor of the share that is cut. The order of units, channels and heads is
# that of Minitron. The numbers are from cuts of one small model (recipes/prune.py); those of layers and experts are a
# guess.
SENSITIVITY = {"ffn": 1.0, "experts": 1.0, "d_model": 3.0, "n_layers": 2.0, "heads": 4.0}


class _Found(NamedTuple):
    far: bool  # below ``NEAR`` of the target
    cost: float
    shape: Shape


class _Shares(NamedTuple):
    """The sizes or shares that are tried for each kind of cut."""

    d_model: Sequence[int]
    heads: Sequence[float]
    experts: Sequence[float]
    ffn: Sequence[float]


def candidates(config: ModelConfig, keep: float, *, axis: Axis, metric: CountedMetric, length: int) -> list[Shape]:
    """Finds shapes that have a given share of a model's parameters or FLOPs; the best guess comes first.

    All shapes have at most ``keep`` of the model's count, and at least ``NEAR`` of that target; if there is no such
    shape, the result is the nearest one below. No two shapes have the same number of layers and hidden channels. The
    order is by an estimate of how much the cuts hurt, see ``SENSITIVITY`` (Muralidharan et al. 2024, Minitron); only
    training tells which shape is best.

    Args:
      config: configuration of the whole model.
      keep: the share of the count that is kept, between 0 and 1.
      axis: "width" keeps all layers, "depth" removes only layers; "any" gives the best shape of each, then mixtures.
      metric: what is counted: "parameters" or "flops".
      length: tokens of a row, for FLOPs.

    Raises:
      ConfigError: no shape is so small, or the model cannot be pruned.
    """
    check_prunable(config)
    for name, value, values in (("axis", axis, get_args(Axis)), ("metric", metric, get_args(CountedMetric))):
        if value not in values:
            raise ConfigError(f"{name} is {value!r}; use one of {', '.join(values)}")
    if not 0 < keep < 1:
        raise ConfigError(f"keep is {keep}; give a share between 0 and 1")
    if axis == "depth" and config.n_layers < 3:
        raise ConfigError(f"axis is 'depth' and the model has {config.n_layers} layers, all of which stay; use 'width'")
    count = Count(config, metric, length)
    whole = count.of(Shape.of(config))
    target, shares, all_layers = keep * whole, _shares(config), [config.n_layers]
    only_layers, fewer = _Shares([config.d_model], [1.0], [1.0], [1.0]), range(2, config.n_layers)
    tried = {"width": (shares, all_layers), "depth": (only_layers, fewer), "any": (shares, fewer or all_layers)}
    found = {name: _search(count, target, *what) for name, what in tried.items() if axis in (name, "any")}
    picked = found[axis]
    if axis == "any":
        mixtures = [f for f in found["any"] if not f.far]
        picked = sorted([*found["width"][:1], *found["depth"][:1], *mixtures], key=lambda f: f.far)
    else:
        picked = [f for f in picked if not f.far]
    picked = picked or found[axis][:1]  # the nearest
    if not picked:
        least = count.of(_smallest(*tried[axis])) / whole
        raise ConfigError(
            f"keep is {keep}, and axis {axis!r} leaves at least {least:.3f} of the {metric}; keep more (--ratio below "
            f"{1 - least:.3f})"
        )
    shapes: dict[tuple[int, int], Shape] = {}
    for f in picked:
        shapes.setdefault((f.shape.n_layers, f.shape.d_model), f.shape)
    return list(shapes.values())


def _search(count: Count, target: float, shares: _Shares, layers: Sequence[int]) -> list[_Found]:
    """The best shape of at most ``target`` for each pair of numbers of layers and channels.

    Shapes near the target come first, by their estimated cost; then the rest, the nearest to the target first.
    """
    found: dict[tuple[int, int], _Found] = {}
    for d_model, heads in itertools.product(shares.d_model, shares.heads):
        outer, parts = count.parts(d_model, heads, shares.experts, shares.ffn)
        for n_layers in layers:
            totals = count.total(outer, parts, n_layers)
            fit, near = totals <= target, (totals <= target) & (totals >= NEAR * target)
            if not fit.any():
                continue
            costs = _costs(count.config, shares, d_model, heads, n_layers)
            best = np.where(near, costs, np.inf) if near.any() else np.where(fit, -totals, np.inf)
            e, f = np.unravel_index(best.argmin(), best.shape)
            shape = Shape(
                d_model=d_model, ffn=shares.ffn[int(f)], heads=heads, experts=shares.experts[int(e)], n_layers=n_layers
            )
            this = _Found(not near.any(), float(best[e, f]), shape)
            key = n_layers, d_model
            found[key] = min(this, found.get(key, this), key=lambda f: f[:2])
    return sorted(found.values(), key=lambda f: f[:2])


def _costs(config: ModelConfig, shares: _Shares, d_model: int, heads: float, n_layers: int) -> np.ndarray:
    """The estimated cost of the cuts, (experts, ffn); see ``SENSITIVITY``."""
    kept: dict[str, Any] = {"d_model": d_model / config.d_model, "n_layers": n_layers / config.n_layers, "heads": heads}
    kept |= {"experts": np.array(shares.experts)[:, None], "ffn": np.array(shares.ffn)}
    return np.asarray(sum((SENSITIVITY[name] * (1 - share)) ** 2 for name, share in kept.items()))


def _smallest(shares: _Shares, layers: Sequence[int]) -> Shape:
    return Shape(**{name: min(values) for name, values in shares._asdict().items()}, n_layers=min(layers))


def _shares(config: ModelConfig) -> _Shares:
    """What is tried: at least half of the channels, the ``head_parts`` and the experts, and a quarter of the units."""
    multiple = multiple_of(config)
    units = {block.mlp.d_ff for block in config.pattern if isinstance(block.mlp, Dense)}
    mixtures = [block.mlp for block in config.pattern if isinstance(block.mlp, MoE)]
    experts = max((mlp.n_experts for mlp in mixtures), default=1)
    used = min((mlp.top_k / mlp.n_experts for mlp in mixtures), default=1.0)
    heads = max(head_parts(standard_attention(block, "a smaller shape")) for block in config.pattern)
    ffn = _steps(max(units, default=1), multiple, LEAST_FFN)
    return _Shares(
        d_model=[round(share * config.d_model) for share in _steps(config.d_model, multiple, 0.5)],
        heads=_steps(heads, 1, 0.5),
        experts=_steps(experts, 1, max(used, 0.5)),
        ffn=[share for share in ffn if all(part(share, size, multiple) for size in units)],
    )


def _steps(size: int, multiple: int, least: float) -> list[float]:
    """Shares of a size, at least ``least``, that give multiples of ``multiple``; and 1."""
    return [n / size for n in range(multiple, size, multiple) if n >= least * size] + [1.0]
