"""Counts the parameters of a model and the bytes in which they are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from efftrain.models.cache import empty_cache
from efftrain.models.config import ModelConfig
from efftrain.models.linear import Embedding
from efftrain.models.quantization import Packed

HEAD = ("head",)  # path of an untied head in a decoder
Path = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters of a model.

    Attributes:
      total: all parameters; a tied head counts once, with the embedding.
      active: parameters that one token uses on average: all except those of experts that it is not routed to and of
        blocks that it does not pass. The whole embedding table counts.
      embedding: parameters of the look-up tables.
      head: parameters of the head's own matrix; 0 if it is tied.
    """

    total: int
    active: int
    embedding: int
    head: int

    @property
    def non_embedding(self) -> int:
        """Parameters without look-up tables and head, which do not depend on the vocabulary."""
        return self.total - self.embedding - self.head


def count_parameters(model: nnx.Module) -> Parameters:
    """Counts the parameters of a model, abstract or not; matrices that are stored quantised count too."""
    tables = embedding_paths(model)
    sizes = {path: numbers(variable) for path, variable in parameters(model)}
    return Parameters(
        total=sum(sizes.values()),
        active=round(sum(active_size(variable) for _, variable in parameters(model))),
        embedding=sum(size for path, size in sizes.items() if path[:-1] in tables),
        head=sum(size for path, size in sizes.items() if path[:-1] == HEAD),
    )


def stored_bytes(model: nnx.Module) -> int:
    """Bytes of all variables of a model in their dtypes, including those that are not trained."""
    return _bytes(nnx.state(model))


def cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes of the KV cache of all layers for each token of a row of ``max_length`` tokens.

    An attention window does not lower it, because the cache has a slot for every position; routed depth does.
    """
    slots = config.max_length
    return round(_bytes(jax.eval_shape(lambda: empty_cache(config, batch=1, slots=slots).layers)) / slots)


def parameters(model: nnx.Module) -> Iterator[tuple[Path, nnx.Variable]]:
    """Iterates over every ``nnx.Param`` and every matrix that is stored quantised.

    Yields:
      The path in the model, such as ``("blocks", 0, "mlp", "up", "kernel")``, and the variable.
    """
    yield from nnx.to_flat_state(nnx.state(model, nnx.filterlib.Any(nnx.Param, Packed)))


def numbers(variable: nnx.Variable) -> int:
    """Number of values that a variable holds; in a packed matrix several values share a byte."""
    return variable.size * variable.get_metadata().get("per_byte", 1)


def active_size(variable: nnx.Variable) -> float:
    """Mean number of a variable's values that one token is multiplied with.

    In the metadata of the variable, ``active`` is the share of the values that a token uses, and ``passes`` is how
    often it uses them; see ``models.depth.routed_depth``.
    """
    return numbers(variable) * variable.get_metadata().get("active", 1.0) * min(passes(variable), 1.0)


def passes(variable: nnx.Variable) -> float:
    """Mean number of times that a token is multiplied with a variable."""
    return variable.get_metadata().get("passes", 1.0)


def embedding_paths(model: nnx.Module) -> set[Path]:
    """The paths of the look-up tables of a model."""
    return {path for path, module in nnx.iter_modules(model) if isinstance(module, Embedding)}


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
