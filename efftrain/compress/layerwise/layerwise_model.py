"""A model taken apart into layers, so that each layer can be changed and freed before the next one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import SingleDeviceSharding

from efftrain.compress.layerwise.calibration import CalibrationRows, forward, inputs_of
from efftrain.models.block import Block, Layer
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.stack import unstack
from efftrain.progress import Progress
from efftrain.train.checkpoints.checkpoints import Checkpoints
from efftrain.train.checkpoints.flat_state import flatten, unflatten
from efftrain.train.run.directory import checkpoint_directory, load_model_config, read_json

BLOCKS = "blocks/"


class LayerwiseModel:
    """A decoder whose layers have separate arrays, instead of arrays that are stacked over the layers.

    Attributes:
      config: configuration of the model.
      outer: a decoder in which only the embedding, the final norm and the head hold arrays.
      layers: the blocks, first to last. Callers remove a layer from the list to free it.
    """

    def __init__(self, config: ModelConfig, arrays: Iterator[tuple[str, Array]]):
        """Takes the arrays of a model apart.

        Args:
          config: configuration of the model.
          arrays: pairs of name and array, as in a checkpoint; arrays of stacked layers are split one by one.
        """
        self.config = config
        abstract = abstract_decoder(config)
        outer: dict[str, Array] = {}
        layers: list[dict[str, Array]] = [{} for _ in config.layers]
        n_positions = len(config.pattern)
        for name, array in arrays:
            if not name.startswith(BLOCKS):
                outer[name] = array
                continue
            position, _, inner = name.removeprefix(BLOCKS).partition("/")
            for repeat, part in enumerate(_apart(array)):
                layers[repeat * n_positions + int(position)][inner] = part
            del array
        graph, state = nnx.split(abstract)
        self.outer = nnx.merge(graph, unflatten(flatten(state) | outer, state))
        split = [nnx.split(stack) for stack in abstract.blocks]
        # The structure of one layer is that of the abstract stack without the stacked axis.
        parts = [(layer_def, jax.eval_shape(lambda s: unstack(s, config.n_repeats)[0], s)) for layer_def, s in split]
        self.layers: list[Layer] = []
        for i, flat in enumerate(layers):
            layer_def, state = parts[i % n_positions]
            self.layers.append(nnx.merge(layer_def, unflatten(flat, state)))

    @staticmethod
    def of(model: Decoder) -> "LayerwiseModel":
        """Takes a model in memory apart; the model itself is not changed."""
        return LayerwiseModel(model.config, iter(flatten(nnx.state(model)).items()))

    @staticmethod
    def read(run: Path) -> "LayerwiseModel":
        """Reads a run's newest checkpoint array by array, so that the memory holds little more than one copy of it."""
        config = load_model_config(run)
        here = SingleDeviceSharding(jax.local_devices()[0])
        variables = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.state(abstract_decoder(config))
        )
        with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
            return LayerwiseModel(config, checkpoints.model_arrays(variables))

    def iterate_layers(
        self, title: str, calibration: CalibrationRows | None = None
    ) -> Iterator[tuple[int, Layer, tuple[np.ndarray, CalibrationRows] | None]]:
        """Iterates over the layers, first to last, so that the caller can change each; ``layers`` is empty afterwards.

        Args:
          title: title of the progress bar.
          calibration: text that is passed through the layers after the caller has changed them. None: no text.

        Yields:
          The number of the layer, the layer, and a pair of its input (rows, length, d_model) and the calibration rows,
          as ``calibration.hessians`` takes them. The input is computed by the layers as the caller changed them. The
          pair is None without calibration text, and for layers that are not plain blocks.
        """
        x_ntd = None if calibration is None else inputs_of(self.outer, calibration)
        n = len(self.layers)
        with Progress(title, n, unit="layers") as progress:
            for number in range(n):
                layer = self.layers.pop(0)
                inputs = None if calibration is None or x_ntd is None else (x_ntd, calibration)
                yield number, layer, inputs if isinstance(layer, Block) else None
                if calibration is not None and x_ntd is not None and number + 1 < n:
                    x_ntd = forward(layer, x_ntd, calibration)
                progress.advance()

    def unrolled(self) -> ModelConfig:
        """The configuration whose pattern contains every layer, for layers that differ from each other."""
        return self.config.replace(pattern=self.config.layers, n_repeats=1)


def assemble(config: ModelConfig, outer: Decoder, layers: list[nnx.State]) -> Decoder:
    """Builds a decoder from its outer part and the states of its layers.

    Args:
      config: configuration of the new model.
      outer: a decoder with the embedding, norm and head of the new model; its blocks are ignored.
      layers: states of the layers, first to last. The list is emptied, so that their memory is freed on the way.
    """
    graph, state = nnx.split(abstract_decoder(config))
    found = {name: leaf for name, leaf in flatten(nnx.state(outer)).items() if not name.startswith(BLOCKS)}
    flat_layers: list[Any] = [flatten(layer) for layer in layers]
    layers.clear()
    for name in flatten(state):
        if name.startswith(BLOCKS):
            position, _, inner = name.removeprefix(BLOCKS).partition("/")
            found[name] = _together([flat.pop(inner) for flat in flat_layers[int(position) :: len(config.pattern)]])
    return nnx.merge(graph, unflatten(found, state))


@jax.jit
def _apart(array: Array) -> list[Array]:
    return [jnp.squeeze(part, 0) for part in jax.lax.split(array, [1] * len(array), axis=0)]


@jax.jit
def _together(parts: list[Array]) -> Array:
    return jnp.stack(parts)
