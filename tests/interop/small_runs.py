"""Small runs of efftrain's own, as training and compression leave them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efftrain.compress.in_memory import convert_run
from efftrain.config import to_json
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization
from efftrain.train.run.model_run import write_model_run
from efftrain.train.state import split_model


def random_model(config: ModelConfig) -> Decoder:
    """A model of which no parameter is at its usual start."""
    model = Decoder(config, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf * 1.3 + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)


def write_run(out: Path, model: Decoder, **settings: Any) -> Path:
    """Writes the run directory of a model; ``settings`` are further fields of its ``config.json``."""
    _, params, rest = split_model(model)
    config = {"model": to_json(model.config)} | settings
    write_model_run(out, {"params": params, "model_state": rest}, step=1, made_from=("made.json", {}), config=config)
    return out


def quantized_run(out: Path, float_run: Path, quantization: Quantization) -> Path:
    """Writes the run that ``efftrain compress quantize`` makes of another run."""
    return write_run(out, convert_run(float_run, None, quantization))


def logits_of(model: Decoder, tokens: Any) -> Any:
    """Logits (batch, length, vocab) of a model in one compiled program."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))(state, jnp.asarray(tokens))
