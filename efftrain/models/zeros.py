"""How many of a model's weights pruning has set to zero."""

from flax import nnx

from efftrain.models.quantization import Matrix
from efftrain.ops.masks import count_zeros

CHANCE = 1e-4  # share of trained weights that may be zero without having been pruned


def zeros_share(model: nnx.Module) -> float:
    """The share of the numbers of all float matrices of blocks that are exactly zero; 0 for a model that was not
    pruned."""
    zeros, size = pruned(model)
    return zeros / size if zeros else 0.0


def pruned(model: nnx.Module) -> tuple[int, int]:
    """How many numbers of the float matrices of blocks are exactly zero, and of how many; no zeros but by pruning."""
    matrices = [v[...] for path, v in nnx.to_flat_state(nnx.state(model, Matrix)) if path[0] == "blocks"]
    zeros, size = sum(map(count_zeros, matrices)), sum(matrix.size for matrix in matrices)
    return zeros if zeros > CHANCE * size else 0, size
