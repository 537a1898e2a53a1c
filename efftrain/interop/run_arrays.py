"""The variables of a run's model, block by block: matrices in float, or as they are stored quantised."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from efftrain.models.config import ModelConfig
from efftrain.models.decoder import abstract_decoder
from efftrain.models.quantization import RATIO, Packed, Quantization, StepRatio, matrices, read, rule_of, weights_format
from efftrain.ops.quantize import unpack
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten
from efftrain.train.checkpoints.streamed_arrays import Index

SCALE = "_scale"  # suffix of the name of the matrix
LEAF = "kernel"  # name of a matrix in a module of its own
Blocks = Iterator[tuple[Index, np.ndarray]]


@dataclass(frozen=True)
class Variable:
    """A variable of a model.

    Attributes:
      shape: its shape.
      blocks: yields (index, block), in the order of the array; the last axis is never split.
    """

    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def float_config(config: ModelConfig) -> ModelConfig:
    """Returns the configuration of the model that has the values of a quantised one in float."""
    return config.replace(quantization=Quantization())


def float_variables(checkpoints: Checkpoints, config: ModelConfig) -> dict[str, Variable]:
    """Returns the variables of a run's model by their names in a float model.

    A matrix that a rule quantises has the values that its products use, also if it is stored in float.

    Args:
      checkpoints: those of the run.
      config: the configuration of its model.

    Raises:
      RunError: there is no checkpoint; iterators raise it too, if an array is damaged.
    """
    abstract, found = _read(checkpoints, config)
    for matrix, module, attribute in matrices(abstract_decoder(config)):
        variable, name = getattr(module, attribute), variable_name(matrix, attribute)
        rule = rule_of(variable)
        if rule is None or rule.weights is None:
            continue
        if isinstance(variable, Packed):
            scales = f"{name}{SCALE}"
            found[name] = _dequantized(_levels(found[name], variable), found.pop(scales), abstract[scales], variable)
        else:
            found[name] = _rounded(found[name], found.pop(f"{name}{RATIO}", None), abstract, name, variable)
    return _with_shapes(found, float_config(config))


def stored_variables(checkpoints: Checkpoints, config: ModelConfig) -> dict[str, Variable]:
    """Returns the variables of a converted run's model; of a quantised matrix its levels, and its scales in float32.

    Levels are not packed, so that they have the shape of the float matrix; the scales' name is that of the matrix with
    the suffix ``_scale``. For arguments and errors see ``float_variables``.
    """
    abstract, found = _read(checkpoints, config)
    scales = {}
    for matrix, module, attribute in matrices(abstract_decoder(config)):
        variable, name = getattr(module, attribute), variable_name(matrix, attribute)
        if isinstance(variable, Packed):
            found[name] = _levels(found[name], variable)
            scale = found.pop(f"{name}{SCALE}")
            shape = abstract[f"{name}{SCALE}"].shape
            scales[f"{name}{SCALE}"] = Variable(shape, ((index, x.astype(np.float32)) for index, x in scale))
    return _with_shapes(found, float_config(config)) | scales


def variable_name(matrix: str, attribute: str) -> str:
    """Name in a checkpoint of a matrix that ``models.quantization.matrices`` yields."""
    return f"{matrix}/{attribute}" if attribute in ("kernel", "table") else matrix


def abstract_variables(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the variables of a model as its checkpoint has them, to be read onto one device."""
    here = SingleDeviceSharding(jax.local_devices()[0])
    state = flatten(nnx.state(abstract_decoder(config)))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for name, x in state.items()}


def _read(checkpoints: Checkpoints, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Blocks]]:
    abstract = abstract_variables(config)
    return abstract, checkpoints.model_blocks(abstract)


def _with_shapes(found: dict[str, Blocks], config: ModelConfig) -> dict[str, Variable]:
    shapes = {name: x.shape for name, x in flatten(nnx.state(abstract_decoder(config))).items()}
    return {name: Variable(shapes[name], blocks) for name, blocks in found.items()}


def _levels(blocks: Blocks, variable: nnx.Variable) -> Blocks:
    """The levels of a packed matrix. A byte holds consecutive ones, so that each block has levels of its own."""
    metadata, format = variable.get_metadata(), weights_format(variable)
    axis, per_byte = metadata["contraction"], metadata["per_byte"]
    for index, packed in blocks:
        parts = list(index)
        parts[axis] = slice(index[axis].start * per_byte, index[axis].stop * per_byte)
        yield tuple(parts), np.asarray(unpack(jnp.asarray(packed), format, axis))


def _dequantized(blocks: Blocks, scales: Blocks, like: Any, variable: nnx.Variable) -> Blocks:
    """Levels times scales, which are read as a whole."""
    metadata = variable.get_metadata()
    axis = metadata["contraction"]
    size = variable.shape[axis] * metadata["per_byte"] // like.shape[axis]
    scale = _whole(scales, like).astype(np.float32)
    for index, levels in blocks:
        group = np.arange(index[axis].start, index[axis].stop) // size
        parts = list(index)
        parts[axis] = slice(None)
        yield index, levels.astype(np.float32) * np.take(scale[tuple(parts)], group, axis)


def _rounded(blocks: Blocks, ratios: Blocks | None, abstract: dict[str, Any], name: str, variable: Any) -> Blocks:
    """The values that the products of a matrix use in training; as one block, because a scale may be of all rows."""
    holder = nnx.Module()
    setattr(holder, LEAF, variable.replace(jnp.asarray(_whole(blocks, abstract[name]))))
    if ratios is not None:
        setattr(holder, f"{LEAF}{RATIO}", StepRatio(jnp.asarray(_whole(ratios, abstract[f"{name}{RATIO}"]))))
    whole = np.asarray(read(holder, LEAF, jnp.float32))
    yield tuple(slice(0, n) for n in whole.shape), whole


def _whole(blocks: Blocks, like: Any) -> np.ndarray:
    array = np.empty(like.shape, like.dtype)
    for index, block in blocks:
        array[index] = block
    return array
