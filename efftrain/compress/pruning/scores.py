"""Scores of weights: the highest stay when a mask is made."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Scores a weight by its magnitude, ``|w|``.

    Attributes:
      straight_through: pruned weights continue to be trained, by the gradient at the masked weights, and may come back;
        this costs a second copy of the weights. Jaxpruner's best score in a language model; in the models of
        ``recipes/prune.py`` it is worse, because masks flicker while the learning rate is high.
    """

    straight_through: bool = False

    def of(self, w: Array, g: Array) -> Array:
        """The scores of weights with their gradients; the highest are kept."""
        return jnp.abs(w)


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """Scores a weight by ``|w g|``, the first-order change of the loss if it were zero; g is the step's gradient.

    Source: Molchanov et al. 2017.
    """

    def of(self, w: Array, g: Array) -> Array:
        return jnp.abs(w * g)


@dataclass(frozen=True, kw_only=True)
class RigL:
    """Sparse training from the start: each update drops the smallest weights and grows as many others from zero.

    Attributes:
      by: grow weights where the gradient is largest ("gradient": RigL, Evci et al. 2020), or at random positions
        ("random": SET, Mocanu et al. 2018).
      exchanged: share of the remaining weights that the first update exchanges; it falls to 0 with half a cosine.
    """

    by: Literal["gradient", "random"] = "gradient"
    exchanged: float = 0.3

    def __post_init__(self):
        if not 0 < self.exchanged < 1:
            raise ConfigError(f"regrow.exchanged is {self.exchanged}; give a share between 0 and 1")

    def of(self, w: Array, g: Array) -> Array:
        return jnp.abs(w)

    def growth(self, g: Array, key: Array) -> Array:
        """The scores by which new weights are chosen among those that are zero."""
        return jnp.abs(g) if self.by == "gradient" else jax.random.uniform(key, g.shape)


@dataclass(frozen=True, kw_only=True)
class FrozenMask:
    """Keeps the zeros of a model that was pruned before, while any optimizer trains it."""


Score = Magnitude | Saliency | RigL | FrozenMask
