"""What a pruning optimizer remembers: the masks of its matrices, eight weights to a byte."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.models.quantization import Matrix
from efftrain.ops.masks import unpack_bits
from efftrain.sharding.layout import is_variable


class Mask(nnx.Variable):
    """Bits of a matrix's mask, 1 where a weight is used: uint8, eight along the axis ``packed`` of its metadata."""


class SparsifyState(NamedTuple):
    """Attributes:
    inner: state of the optimizer that is wrapped.
    masks: by the names of matrices.
    count: () int32 updates; of a run that branches off another one, with those of that one.
    fresh: () bool, before the first update of this optimizer.
    kept: arrays like the matrices, by their names: the dense weights of a straight-through score, or those to which a
      schedule rewinds; else empty.
    """

    inner: Any
    masks: dict[str, Mask]
    count: Array
    fresh: Array
    kept: dict[str, nnx.Variable]

    def zero_pruned(self, params: Any) -> Any:
        """Parameters, or averages of them, with zeros for the weights that are pruned: ``train.averages.Pruning``."""

        def zeroed(path: tuple, leaf: Any) -> Any:
            if not may_be_pruned(leaf) or matrix_name(path) not in self.masks:
                return leaf
            mask = self.masks[matrix_name(path)]
            axis = mask.get_metadata()["packed"]
            return leaf.replace(jnp.where(unpack_bits(mask[...], leaf.shape[axis], axis), leaf[...], 0))

        return jax.tree_util.tree_map_with_path(zeroed, params, is_leaf=is_variable)


def may_be_pruned(leaf: Any) -> bool:
    """Whether a leaf of a tree like the parameters is a matrix of a block."""
    return isinstance(leaf, Matrix) and "vocab" not in leaf.get_metadata()["axes"]


def matrix_name(path: tuple) -> str:
    """The name of the matrix at a path of a tree like the parameters, such as ``blocks/0/mlp/up``."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/kernel")
