"""Sparse training as an optax wrapper, composed of a score, a schedule, a structure and a distribution.

The optimizer's state holds the masks, eight weights to a byte. Its updates take pruned weights exactly to zero, so that
plain ``optax.apply_updates`` is all that a training step needs. Zeros make a model smaller on disk, but not faster: JAX
has no sparse products on its accelerators.

Modelled on jaxpruner (Lee et al. 2023), which changes the parameters in a hook after the update.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from efftrain.compress.pruning.scores import FrozenMask, Magnitude, RigL, Score
from efftrain.compress.pruning.sparsity_schedules import (
    Constant,
    Distribution,
    Global,
    Gradual,
    Iterative,
    OneShot,
    Schedule,
    Shape,
    Uniform,
)
from efftrain.compress.pruning.sparsity_state import Mask, SparsifyState, matrix_name, may_be_pruned
from efftrain.errors import ConfigError
from efftrain.ops.joint_ranking import keep_highest_together
from efftrain.ops.masks import (
    SemiStructured,
    Structure,
    Unstructured,
    keep_highest,
    kept_units,
    kept_units_together,
    pack_bits,
    unpack_bits,
)
from efftrain.ops.platform import conditional
from efftrain.sharding.layout import is_variable
from efftrain.train.config import Training
from efftrain.train.schedules import WarmupStableDecay

Arrays = dict[str, Array]  # keys: names of matrices


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """How a model is pruned while it is trained.

    Attributes:
      structure: the pattern of zeros and the target sparsity.
      schedule: in which steps the masks change, and which share of the target is reached.
      score: which weights are kept: those of the highest score.
      distribution: how the target is divided between the matrices.
      layers: a regular expression for the names of matrices, such as ``blocks/.*/mlp/.*``; see ``QuantizationRule``.
        Embedding, head, norms and routers are never pruned.
    """

    structure: Structure = field(default_factory=Unstructured)
    schedule: Schedule = field(default_factory=Gradual)
    score: Score = field(default_factory=Magnitude)
    distribution: Distribution = field(default_factory=Uniform)
    layers: str = "blocks/.*"

    def __post_init__(self):
        if isinstance(self.structure, SemiStructured) and not isinstance(self.distribution, Uniform):
            raise ConfigError("sparsity n:m is the same in every matrix; use the distribution Uniform")
        if isinstance(self.score, RigL) != isinstance(self.schedule, Constant):
            raise ConfigError("the score RigL and the schedule Constant need each other; use both or neither")
        if isinstance(self.score, RigL) and isinstance(self.distribution, Global):
            raise ConfigError("RigL exchanges weights within a matrix; use the distribution Uniform or ErdosRenyi")
        if isinstance(self.schedule, Iterative):
            if self.schedule.sparsity != self.structure.sparsity:
                raise ConfigError(
                    f"iterative.sparsity is {self.schedule.sparsity} and that of the structure "
                    f"{self.structure.sparsity}; give both the same value"
                )
            if self.schedule.rewind and self._straight_through:
                raise ConfigError("iterative.rewind and magnitude.straight_through cannot be combined; use one of them")
        try:
            re.compile(self.layers)
        except re.error as error:
            raise ConfigError(f"sparsity.layers {self.layers!r} is not a regular expression ({error})") from error

    @property
    def _straight_through(self) -> bool:
        return isinstance(self.score, Magnitude) and self.score.straight_through

    def around(self, training: Training) -> Callable[[optax.GradientTransformation], optax.GradientTransformation]:
        """The function with which ``fit`` wraps its optimizer.

        Args:
          training: of the run; its number of steps and its schedule are read.

        Raises:
          ConfigError: masks would change while the learning rate decays, or after the last step.
        """
        decay = training.schedule.decay if isinstance(training.schedule, WarmupStableDecay) else 0.0
        if self.schedule.end > 1 - decay:
            raise ConfigError(
                f"pruning ends at {self.schedule.end} of the steps and the learning rate decays from {1 - decay:g} on; "
                "end pruning earlier, so that the weights can recover"
            )
        if round(self.schedule.end * training.steps) >= training.steps:
            raise ConfigError(f"pruning ends at {self.schedule.end} of the steps, after the last one; end it earlier")
        return lambda inner: sparsify(inner, self, training.steps)


def hold_zeros() -> Sparsity:
    """The sparsity for training a pruned model: weights that are zero at the start stay zero."""
    return Sparsity(schedule=OneShot(at=0.0), score=FrozenMask())


def sparsify(inner: optax.GradientTransformation, sparsity: Sparsity, n_steps: int) -> optax.GradientTransformation:
    """Wraps an optimizer so that it prunes: a fixed number of weights stays, and all pruned weights are exactly zero.

    Its state works on any mesh that the parameters work on. Unless the score is straight-through, the gradients of
    pruned weights are set to zero before the inner optimizer sees them: they do not count in a global norm, and their
    moments decay.

    Args:
      inner: an optimizer over NNX states whose matrices are ``Matrix`` variables.
      sparsity: which weights are pruned, and when.
      n_steps: number of steps of the run; schedules are shares of it.

    Returns:
      The wrapped optimizer; its ``update`` needs the parameters.

    Raises:
      ConfigError: (from ``init``) no matrix has such a name, or the structure does not divide one.
    """

    def init(params: Any) -> SparsifyState:
        found = _prunable(params, sparsity)

        def ones(variable: nnx.Variable) -> Mask:
            axis, shape = _packed_axis(variable), list(variable.shape)
            shape[axis] = -(-shape[axis] // 8)
            axes, units = _with(_axes(variable), axis, None), _with(variable.get_metadata()["units"], axis, shape[axis])
            return Mask(jnp.full(shape, 255, jnp.uint8), axes=axes, units=units, packed=axis)

        kept = {}
        if sparsity._straight_through or _rewinds(sparsity):
            kept = {name: variable.replace(jnp.zeros_like(variable[...])) for name, variable in found.items()}
        masks = {name: ones(variable) for name, variable in found.items()}
        return SparsifyState(inner.init(params), masks, jnp.zeros((), jnp.int32), jnp.ones((), bool), kept)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, SparsifyState]:
        gradients = updates
        if params is None:
            raise ValueError("sparsify needs the parameters: optimizer.update(gradients, state, params)")
        g, w = (_arrays(_prunable(tree, sparsity)) for tree in (gradients, params))
        shapes = {name: a.shape for name, a in w.items()}
        kept = {name: variable[...] for name, variable in state.kept.items()}
        if kept:  # copied in the first update, because a run may load its parameters after ``init``
            starts = state.fresh
            if _rewinds(sparsity):
                starts |= state.count == round(sparsity.schedule.start * n_steps)
            kept = {name: jnp.where(starts, w[name], kept[name]) for name in kept}
        latent = kept if sparsity._straight_through else w

        packed = _arrays(state.masks)
        axes = {name: mask.get_metadata()["packed"] for name, mask in state.masks.items()}
        due = sparsity.schedule.due(state.count, n_steps)
        # A run that resumes from another may begin after the step in which the masks were due.
        due |= state.fresh & (sparsity.schedule.fraction(state.count, n_steps) > 0)

        def renewed(latent: Arrays, g: Arrays, packed: Arrays) -> Arrays:
            masks = _unpack(packed, shapes, axes)
            masks = new_masks(sparsity, n_steps, latent, g, masks, state.count)
            return {name: pack_bits(mask, axes[name]) for name, mask in masks.items()}

        packed = conditional(due, renewed, lambda latent, g, packed: packed, latent, g, packed)
        masks = _unpack(packed, shapes, axes)

        if sparsity._straight_through:
            updates, inner_state = inner.update(gradients, state.inner, _replaced(params, latent, sparsity))
            kept = {name: latent[name] + u for name, u in _arrays(_prunable(updates, sparsity)).items()}
            target = kept
        else:
            masked = {name: jnp.where(masks[name], g[name], 0) for name in g}
            updates, inner_state = inner.update(_replaced(gradients, masked, sparsity), state.inner, params)
            target = {name: w[name] + u for name, u in _arrays(_prunable(updates, sparsity)).items()}
            if _rewinds(sparsity):
                target = {name: jnp.where(due, kept[name], target[name]) for name in target}
        # The update of a pruned weight is 0 - w, and w + (0 - w) is exactly zero.
        to_target = {name: jnp.where(masks[name], target[name], 0) - w[name] for name in w}
        state = SparsifyState(
            inner_state,
            {name: mask.replace(packed[name]) for name, mask in state.masks.items()},
            state.count + 1,
            jnp.zeros((), bool),
            {name: variable.replace(kept[name]) for name, variable in state.kept.items()},
        )
        return _replaced(updates, to_target, sparsity), state

    return optax.GradientTransformation(init, update)


def new_masks(sparsity: Sparsity, n_steps: int, w: Arrays, g: Arrays, masks: Arrays, step: Array) -> dict[str, Array]:
    """Computes the new masks in a step in which masks change.

    Args:
      sparsity, n_steps: see ``sparsify``.
      w, g: weights and gradients (..., d_in, d_out), by name. Each matrix of the leading axes is pruned separately.
      masks: bool, the masks until now.
      step: () int32.

    Returns:
      The masks by name, bool (..., d_in, d_out).
    """
    structure, score, distribution = sparsity.structure, sparsity.score, sparsity.distribution
    if isinstance(score, FrozenMask):
        return {name: w[name] != 0 for name in w}
    shapes = {name: _three(a) for name, a in w.items()}
    fraction = sparsity.schedule.fraction(step, n_steps)

    def groups(arrays: Mapping[str, Array]) -> Arrays:
        return {name: structure.group(a.reshape(shapes[name])) for name, a in arrays.items()}

    scores = groups({name: score.of(w[name], g[name]) for name in w})
    if isinstance(distribution, Global):
        n_keep = kept_units_together(structure, sum(a.size for a in scores.values()), fraction)
        parts = [_with_least(score_lgu, distribution.max_sparsity) for score_lgu in scores.values()]
        keep = dict(zip(scores, keep_highest_together(parts, n_keep), strict=True))
    else:
        targets = distribution.sparsities(shapes, structure.sparsity)
        keep = {}
        for i, (name, score_lgu) in enumerate(scores.items()):
            n_keep = kept_units(structure, score_lgu.shape[-1], fraction, targets[name])
            if not isinstance(score, RigL):
                keep[name] = jax.lax.map(partial(keep_highest, n_keep=n_keep), score_lgu)  # one matrix at a time
                continue
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), i)
            growth_lgu = structure.group(score.growth(g[name], key).reshape(shapes[name]))
            old_lgu = structure.group(masks[name].reshape(shapes[name])) > 0
            way = jnp.clip(step / max(sparsity.schedule.end * n_steps, 1), 0, 1)
            n_new = jnp.round(score.exchanged / 2 * (1 + jnp.cos(jnp.pi * way)) * n_keep).astype(jnp.int32)
            stays = keep_highest(jnp.where(old_lgu, score_lgu, -jnp.inf), n_keep - n_new)
            keep[name] = stays | keep_highest(jnp.where(stays, -jnp.inf, growth_lgu), n_new)
    return {name: structure.ungroup(k, shapes[name]).reshape(w[name].shape) for name, k in keep.items()}


def _with_least(score_lgu: Array, max_sparsity: float) -> Array:
    """Scores with infinity for the highest ``1 - max_sparsity`` of each matrix, which a joint ranking then keeps."""
    n_least = -(-round((1 - max_sparsity) * 1e6) * score_lgu.shape[-1] // 1_000_000)
    return jnp.where(keep_highest(score_lgu, n_least), jnp.inf, score_lgu)


def _rewinds(sparsity: Sparsity) -> bool:
    return isinstance(sparsity.schedule, Iterative) and sparsity.schedule.rewind


def _prunable(tree: Any, sparsity: Sparsity) -> dict[str, nnx.Variable]:
    """The variables that are pruned, by name, of a tree with the structure of the parameters."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    named = {matrix_name(path): leaf for path, leaf in leaves if may_be_pruned(leaf)}
    found = {name: leaf for name, leaf in named.items() if re.fullmatch(sparsity.layers, name)}
    if not found:
        raise ConfigError(
            f"sparsity.layers is {sparsity.layers!r}, which matches no matrix; they are {', '.join(sorted(named)[:8])}"
        )
    for name, leaf in found.items():
        sparsity.structure.check(name, *leaf.shape[-2:])
    return found


def _replaced(tree: Any, arrays: Arrays, sparsity: Sparsity) -> Any:
    """The tree with the given arrays in place of those of the matrices with these names."""

    def replace(path: tuple, leaf: Any) -> Any:
        return leaf.replace(arrays[matrix_name(path)]) if may_be_pruned(leaf) and matrix_name(path) in arrays else leaf

    return jax.tree_util.tree_map_with_path(replace, tree, is_leaf=is_variable)


def _arrays(variables: Mapping[str, nnx.Variable]) -> Arrays:
    return {name: variable[...] for name, variable in variables.items()}


def _unpack(packed: Arrays, shapes: Mapping[str, tuple[int, ...]], axes: Mapping[str, int]) -> Arrays:
    return {name: unpack_bits(bits, shapes[name][axes[name]], axes[name]) for name, bits in packed.items()}


def _packed_axis(variable: nnx.Variable) -> int:
    """The axis along which eight weights share a byte: not the one that FSDP shards, so that bits are sharded too."""
    axes = _axes(variable)
    return len(axes) - 1 if axes[-1] != "embed" else len(axes) - 2


def _axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    return variable.get_metadata()["axes"]


def _with(values: tuple, i: int, value: Any) -> tuple:
    return (*values[:i], value, *values[i + 1 :])


def _three(a: Array) -> Shape:
    d, f = a.shape[-2:]
    return a.size // (d * f), d, f
