"""Optimizers: small configurations that build optax transformations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from efftrain.errors import ConfigError
from efftrain.models.linear import TABLE_AXES
from efftrain.sharding.layout import is_variable


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Base class of every optimizer configuration; a fork derives its own from it.

    ``build`` takes the schedule, which gives a factor in [0, 1] of ``peak_lr`` at each step, and returns the
    transformation. The loop clips the gradient norm before it, and reports ``peak_lr`` times the factor as ``lr``.

    Attributes:
      peak_lr: largest learning rate.
    """

    peak_lr: float = 3e-3

    def build(self, factor: optax.Schedule) -> optax.GradientTransformation:
        raise TypeError(f"{type(self).__name__} has no build method")


@dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay on matrices. Loshchilov and Hutter 2019.

    Attributes:
      peak_lr: largest learning rate.
      b1, b2: decays of the first and the second moment.
      eps: added to the root of the second moment.
      weight_decay: weight decay of matrices, per unit of learning rate.
    """

    peak_lr: float = 3e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self):
        _check(self)

    def build(self, factor: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: self.peak_lr * factor(step),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=is_matrix,
        )


@dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Orthogonalised momentum for the matrices of the layers, AdamW for the rest (tables, head, norms).

    Updates are scaled to the size of Adam's (``consistent_rms``), so one learning rate serves both.

    Attributes:
      peak_lr: largest learning rate, of both optimizers.
      momentum: decay of Muon's momentum.
      b1, b2: decays of AdamW's first and second moment.
      weight_decay: weight decay of matrices, per unit of learning rate.
      consistent_rms: root mean square to which Muon's updates are scaled.

    Source: Jordan et al. 2024; scaling from Liu et al. 2025 (Moonlight), section 2.2.
    """

    peak_lr: float = 3e-3
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    consistent_rms: float = 0.2

    def __post_init__(self):
        _check(self)

    def build(self, factor: optax.Schedule) -> optax.GradientTransformation:
        muon = optax.contrib.muon(
            lambda step: self.peak_lr * factor(step),
            beta=self.momentum,
            weight_decay=self.weight_decay,
            consistent_rms=self.consistent_rms,
            muon_weight_dimension_numbers=muon_dimensions,
        )
        # AdamW instead of the Adam inside optax's Muon, which has Nesterov momentum and decays norms.
        adam = AdamW(peak_lr=self.peak_lr, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay).build(factor)
        return optax.partition({"muon": muon, "adam": adam}, muon_or_adam)


def with_clipping(optimizer: optax.GradientTransformation, clip_norm: float | None) -> optax.GradientTransformation:
    """Puts a clip of the global gradient norm before the optimizer.

    Args:
      optimizer: gets the clipped gradients.
      clip_norm: largest global norm. None: no clipping.
    """
    if clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def is_matrix(params: Any) -> Any:
    """Marks the parameters to which weight decay applies: True for each that is a matrix without its layer axis."""
    return _per_parameter(lambda axes: len(_own_axes(axes)) >= 2, params)


def muon_dimensions(params: Any) -> Any:
    """Selects the axes of each parameter that Muon treats as the matrix; None leaves the parameter to Adam.

    Layers (and experts) are batch axes: a stacked weight gets the same update as its layers would get separately.
    """

    def dimensions(axes: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
        if len(_own_axes(axes)) < 2 or not TABLE_AXES.isdisjoint(axes):
            return None
        return MuonDimensionNumbers(reduction_axis=len(axes) - 2, output_axis=len(axes) - 1)

    return _per_parameter(dimensions, params)


def muon_or_adam(params: Any) -> Any:
    """Labels each parameter ``muon`` or ``adam``."""
    return jax.tree.map(
        lambda variable: variable.replace("adam" if variable.get_value() is None else "muon"),
        muon_dimensions(params),
        is_leaf=is_variable,
    )


def _per_parameter(rule: Callable[[tuple[str | None, ...]], Any], params: Any) -> Any:
    """Returns a tree like ``params`` with, for each array, the result of the rule for its logical axes."""

    def answer(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(rule(variable.get_metadata()["axes"]))

    return jax.tree.map(answer, params, is_leaf=is_variable)


def _own_axes(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    return tuple(axis for axis in axes if axis not in ("layers", "experts", "groups"))


def _check(config: AdamW | Muon) -> None:
    if not config.peak_lr > 0:
        raise ConfigError(f"optimizer.peak_lr is {config.peak_lr}; it must be above 0")
    if not config.weight_decay >= 0:
        raise ConfigError(f"optimizer.weight_decay is {config.weight_decay}; it must not be negative")
    for name in ("b1", "b2", "momentum"):
        if not 0 <= getattr(config, name, 0) < 1:
            raise ConfigError(f"optimizer.{name} is {getattr(config, name)}; give a number from 0 to below 1")
