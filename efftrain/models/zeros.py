"""Counts the weights of a model that pruning has set to zero."""

from flax import nnx

from efftrain.models.quantization import Matrix
from efftrain.ops.masks import count_zeros

CHANCE = 1e-4  # share of trained weights that may be zero without having been pruned


def zeros_share(model: nnx.Module) -> float:
    """Share of exact zeros among the numbers of all float matrices of the blocks; 0 for a model that was not pruned."""
    zeros, size = pruned(model)
    return zeros / size if zeros else 0.0


def pruned(model: nnx.Module) -> tuple[int, int]:
    """Number of exact zeros in the float matrices of the blocks (0 if so few that none is from pruning), and of all."""
    matrices = [v[...] for path, v in nnx.to_flat_state(nnx.state(model, Matrix)) if path[0] == "blocks"]
    zeros, size = sum(map(count_zeros, matrices)), sum(matrix.size for matrix in matrices)
    return zeros if zeros > CHANCE * size else 0, size
