"""A model taken apart into its layers, so that each can be changed and let go before the next."""

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
from efftrain.models.block import Block
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder, abstract_decoder
from efftrain.models.stack import unstack
from efftrain.progress import Progress
from efftrain.train.checkpoints.checkpoints import Checkpoints, flatten, unflatten
from efftrain.train.run.directory import checkpoint_directory, load_model_config, read_json

BLOCKS = "blocks/"


class LayerwiseModel:
    """A decoder whose layers have arrays of their own.

    Attributes:
      config: of the model.
      outer: a decoder in which only the embedding, the last norm and the head hold arrays.
      layers: the blocks, first to last. Whoever is done with one takes it out of the list.
    """

    def __init__(self, config: ModelConfig, arrays: Iterator[tuple[str, Array]]):
        """Arrays by name, as in a checkpoint; those of stacked layers are cut apart as they come."""
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
        # A layer's structure, from the abstract stack without its axis.
        parts = [(layer_def, jax.eval_shape(lambda s: unstack(s, config.n_repeats)[0], s)) for layer_def, s in split]
        self.layers: list[nnx.Module] = []
        for i, flat in enumerate(layers):
            layer_def, state = parts[i % n_positions]
            self.layers.append(nnx.merge(layer_def, unflatten(flat, state)))

    @staticmethod
    def of(model: Decoder) -> "LayerwiseModel":
        """Of a model in memory, which stays as it is."""
        return LayerwiseModel(model.config, iter(flatten(nnx.state(model)).items()))

    @staticmethod
    def read(run: Path) -> "LayerwiseModel":
        """Of a run's newest checkpoint, array by array: the most that is held is the model and its smallest array."""
        config = load_model_config(run)
        here = SingleDeviceSharding(jax.local_devices()[0])
        variables = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), nnx.state(abstract_decoder(config))
        )
        with Checkpoints(checkpoint_directory(run, read_json(run / "config.json")), read_only=True) as checkpoints:
            return LayerwiseModel(config, checkpoints.model_arrays(variables))

    def walk(
        self, title: str, calibration: CalibrationRows | None = None
    ) -> Iterator[tuple[int, nnx.Module, tuple[np.ndarray, CalibrationRows] | None]]:
        """Every layer, to be changed, first to last; they are gone afterwards.

        Args:
          title: of the progress.
          calibration: text that goes through the layers as they are changed. None: none does.

        Yields:
          The number of the layer, the layer, and what it reads after the layers before it were changed, with the text
          that this is of, as ``calibration.hessians`` takes them. None without text, and for layers that are no plain
          blocks.
        """
        x_ntd = None if calibration is None else inputs_of(self.outer, calibration)
        n = len(self.layers)
        with Progress(title, n, unit="layers") as progress:
            for number in range(n):
                layer = self.layers.pop(0)
                observe = calibration is not None and isinstance(layer, Block)
                yield number, layer, (x_ntd, calibration) if observe else None
                if calibration is not None and number + 1 < n:
                    x_ntd = forward(layer, x_ntd, calibration)
                progress.advance()

    def unrolled(self) -> ModelConfig:
        """The configuration in which every layer stands in the pattern: for layers that differ."""
        return self.config.replace(pattern=self.config.layers, n_repeats=1)


def assemble(config: ModelConfig, outer: Decoder, layers: list[nnx.State]) -> Decoder:
    """The decoder of a configuration from its outer part and the states of its layers.

    Args:
      config: of the new model.
      outer: embedding, norm and head of the new model, anything in place of its blocks.
      layers: emptied here, position by position.
    """
    graph, state = nnx.split(abstract_decoder(config))
    found = {name: leaf for name, leaf in flatten(nnx.state(outer)).items() if not name.startswith(BLOCKS)}
    flat_layers: list[Any] = [flatten(layer) for layer in layers]
    layers.clear()
    for name in flatten(state):
        if name.startswith(BLOCKS):
            position, _, inner = name.removeprefix(BLOCKS).partition("/")
            found[name] = jnp.stack([flat.pop(inner) for flat in flat_layers[int(position) :: len(config.pattern)]])
    return nnx.merge(graph, unflatten(found, state))


def _apart(array: Array) -> list[Array]:
    return [jnp.squeeze(part, 0) for part in jax.lax.split(array, [1] * len(array), axis=0)]
