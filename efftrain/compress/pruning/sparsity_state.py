"""The state of a pruning optimizer: the masks of its matrices, eight weights to a byte."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efftrain.models.linear import TABLE_AXES
from efftrain.models.quantization import Matrix
from efftrain.ops.masks import unpack_bits
from efftrain.sharding.layout import is_variable


class Mask(nnx.Variable):
    """The mask of a matrix as bits, 1 where a weight is kept.

    The array is uint8; each byte holds eight weights along the axis that the metadata entry ``packed`` names.
    """


class SparsifyState(NamedTuple):
    """The state of the optimizer that ``sparsify`` returns.

    Attributes:
      inner: state of the wrapped optimizer.
      masks: the masks, by the names of matrices.
      count: () int32, number of updates; a run that resumes from another continues the count of that run.
      fresh: () bool, True until the first update of this optimizer.
      kept: arrays of the shapes of the matrices, by their names: the dense weights of a straight-through score, or the
        weights to which a schedule rewinds. Otherwise empty.
    """

    inner: Any
    masks: dict[str, Mask]
    count: Array
    fresh: Array
    kept: dict[str, nnx.Variable]

    def zero_pruned(self, params: Any) -> Any:
        """Parameters, or averages of them, with zeros for the pruned weights; see ``train.averages.Pruning``."""

        def zeroed(path: tuple, leaf: Any) -> Any:
            if not may_be_pruned(leaf) or matrix_name(path) not in self.masks:
                return leaf
            mask = self.masks[matrix_name(path)]
            axis = mask.get_metadata()["packed"]
            return leaf.replace(jnp.where(unpack_bits(mask[...], leaf.shape[axis], axis), leaf[...], 0))

        return jax.tree_util.tree_map_with_path(zeroed, params, is_leaf=is_variable)


def may_be_pruned(leaf: Any) -> bool:
    """Whether a leaf of the parameters, or of a tree with their structure, is a matrix of a block."""
    return isinstance(leaf, Matrix) and TABLE_AXES.isdisjoint(leaf.get_metadata()["axes"])


def matrix_name(path: tuple) -> str:
    """The name of the matrix at a path of the parameters' tree, such as ``blocks/0/mlp/up``."""
    return jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/kernel")
