"""Stacks with a depth policy made from plain ones, and the conversion of a trained model to a mixture of depths."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from efftrain.config import difference, to_json
from efftrain.errors import ConfigError
from efftrain.models.config import DepthConfig, Full, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import MixtureOfDepths, Recursion

FREE = ("dtype", "scan", "remat", "layer_dropout")  # fields of ``ModelConfig`` in which both models may differ
OUTSIDE = ("embedding", "norm", "head", "positions")  # the parts of a decoder beside its layers


def every_second(model: ModelConfig, depth: DepthConfig) -> ModelConfig:
    """Returns the same stack with this depth policy in every second layer, from the second one on.

    Raises:
      ConfigError: the number of layers is odd.
    """
    pattern, n_repeats = model.pattern, model.n_repeats
    if model.n_layers % 2:
        raise ConfigError(f"the model has {model.n_layers} layers, of which not every second one can be routed")
    if len(pattern) % 2:
        pattern, n_repeats = pattern * 2, n_repeats // 2
    routed = (dataclasses.replace(block, depth=depth) if i % 2 else block for i, block in enumerate(pattern))
    return model.replace(pattern=tuple(routed), n_repeats=n_repeats)


def looped(model: ModelConfig, n_layers: int, shares: tuple[float, ...]) -> ModelConfig:
    """Returns a first and a last block, and between them ``n_layers`` that tokens pass several times (recursion).

    Args:
      model: gives the block, the first one of its pattern, and all else.
      n_layers: number of layers in a round.
      shares: see ``Recursion``.
    """
    block = model.pattern[0]
    middle = dataclasses.replace(block, depth=Recursion(n_layers=n_layers, shares=shares))
    return model.replace(pattern=(block, middle, block), n_repeats=1)


def with_mixture_of_depths(plain: Decoder, config: ModelConfig, *, rngs: nnx.Rngs) -> Decoder:
    """Returns a mixture of depths with the layers of a plain model; the routers are new.

    A router that is not trained leaves the tokens that pass nearly as they are in the plain model, and the others skip
    the layer, so that the model has to be trained. With a capacity of 1 there are no routers, and the first step
    computes the same as the plain model.

    Args:
      plain: a trained model in which every token passes every layer.
      config: configuration of the mixture: that of the plain model, except that some blocks are ``MixtureOfDepths``.
      rngs: random keys for the routers.

    Raises:
      ConfigError: the models differ in something else.

    Source: Raposo et al. 2024 (Mixture-of-Depths) for the layer; Zhang et al. 2024 (MoDification) for the conversion.
    """
    check_mixture_of_depths(plain.config, config)
    routed, layers = Decoder(config, rngs=rngs), plain.layers()
    for name in OUTSIDE:
        if hasattr(plain, name):
            nnx.update(getattr(routed, name), nnx.state(getattr(plain, name)))
    for position, stack in enumerate(routed.blocks):
        states = [dict(nnx.to_flat_state(nnx.state(layer))) for layer in layers[position :: len(config.pattern)]]
        for path, variable in nnx.to_flat_state(nnx.state(stack)):
            if path[0] != "routers":
                of_layer = path[2:] if path[0] == "layers" else path  # a routed block holds its layer as layers/0
                variable[...] = jnp.stack([state[of_layer][...] for state in states])
    return routed


def check_mixture_of_depths(plain: ModelConfig, config: ModelConfig) -> None:
    """Raises ``ConfigError`` if ``with_mixture_of_depths`` cannot make a model of ``config`` from one of ``plain``."""
    for i, block in enumerate(plain.layers):
        if block.depth != Full():
            raise ConfigError(f"layer {i} of the model to convert has a depth policy already; give a plain model")
    for i, block in enumerate(config.layers):
        if not isinstance(block.depth, Full | MixtureOfDepths):
            raise ConfigError(
                f"layer {i}: {type(block.depth).__name__} cannot take over the layers of a plain model; use "
                "MixtureOfDepths, or train the model from the beginning"
            )
    if lines := difference(_without_depth(plain), _without_depth(config), "model"):
        raise ConfigError(f"{lines[0]}: the model to convert differs in this field; give both the same value")


def _without_depth(config: ModelConfig) -> dict[str, Any]:
    fields = {name: value for name, value in to_json(config).items() if name not in (*FREE, "n_repeats")}
    return fields | {"pattern": [to_json(dataclasses.replace(block, depth=Full())) for block in config.layers]}
