"""How many numbers a model holds, and in how many bytes they are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from efftrain.models.cache import empty_cache
from efftrain.models.config import ModelConfig
from efftrain.models.linear import Embedding
from efftrain.models.quantization import Packed

HEAD = ("head",)  # path of the untied head in a decoder
Path = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of trained parameters.

    Attributes:
      total: all of them; a tied head is the embedding and counts once.
      active: those that one token uses, on average: all but the experts that it does not go to and the blocks that it
        does not pass. The whole embedding table counts.
      embedding: of the look-up tables.
      head: of the head's own matrix, 0 where it is tied.
    """

    total: int
    active: int
    embedding: int
    head: int

    @property
    def non_embedding(self) -> int:
        """Without tables and head: what depth and width cost, whatever the vocabulary."""
        return self.total - self.embedding - self.head


def count_parameters(model: nnx.Module) -> Parameters:
    """Counts the ``parameters`` of a model, abstract or not."""
    tables = embedding_paths(model)
    sizes = {path: numbers(variable) for path, variable in parameters(model)}
    return Parameters(
        total=sum(sizes.values()),
        active=round(sum(active_size(variable) for _, variable in parameters(model))),
        embedding=sum(size for path, size in sizes.items() if path[:-1] in tables),
        head=sum(size for path, size in sizes.items() if path[:-1] == HEAD),
    )


def stored_bytes(model: nnx.Module) -> int:
    """Bytes of every variable in the type that it has, those that are not trained too."""
    return _bytes(nnx.state(model))


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that decoding keeps for each token of a row: keys and values of all layers, as the cache stores them.

    A window does not lower it: the cache has a slot for every position. Routed depth does, in rows of ``max_length``.
    """
    slots = config.max_length
    return round(_bytes(jax.eval_shape(lambda: empty_cache(config, batch=1, slots=slots).layers)) / slots)


def parameters(model: nnx.Module) -> Iterator[tuple[Path, nnx.Variable]]:
    """Every ``nnx.Param``, and every matrix that is stored quantised, with its path from the model, such as
    ``("blocks", 0, "mlp", "up", "kernel")``."""
    yield from nnx.to_flat_state(nnx.state(model, nnx.filterlib.Any(nnx.Param, Packed)))


def numbers(variable: nnx.Variable) -> int:
    """How many a variable holds; several of a packed matrix share a byte."""
    return variable.size * variable.get_metadata().get("per_byte", 1)


def active_size(variable: nnx.Variable) -> float:
    """How many of a variable's numbers one token is multiplied with, on average over tokens.

    In its metadata, ``active`` is their share, and ``passes`` how often a token meets them, see
    ``models.depth.routed_depth``.
    """
    return numbers(variable) * variable.get_metadata().get("active", 1.0) * min(passes(variable), 1.0)


def passes(variable: nnx.Variable) -> float:
    """How often a token is multiplied with a variable, on average over tokens."""
    return variable.get_metadata().get("passes", 1.0)


def embedding_paths(model: nnx.Module) -> set[Path]:
    """Where the look-up tables are."""
    return {path for path, module in nnx.iter_modules(model) if isinstance(module, Embedding)}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
