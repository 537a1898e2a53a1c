"""Search for the shapes of smaller models that decode in a given share of the measured time."""

import numpy as np
from flax import nnx

from efftrain.compress.structured.shape import Shape, shaped
from efftrain.compress.structured.shapes import Axis, candidates
from efftrain.errors import ConfigError
from efftrain.measure.cost.latency import measure_latency
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.progress import Progress

SHARES = np.arange(0.95, 0.2, -0.05)  # shares of the parameters that are tried


def fast_shapes(config: ModelConfig, keep: float, *, axis: Axis, length: int) -> list[Shape]:
    """Finds the largest shapes that decode a token in ``keep`` of the model's time: one for width, one for depth.

    The time is measured for one row on this machine, so that nothing else should run on it.

    Args:
      config: configuration of the whole model.
      keep: the share of the time per token, between 0 and 1.
      axis: "width" or "depth" for one of the two shapes, "any" for both.
      length: tokens of a row; see ``candidates``.

    Raises:
      ConfigError: no shape is so fast.
    """
    axes = ("width", "depth") if axis == "any" and config.n_layers > 2 else ("width",) if axis == "any" else (axis,)
    for one in axes:
        candidates(config, float(SHARES[0]), axis=one, metric="parameters", length=length)  # fail before measuring
    whole, found = decode_s(config), []
    with Progress("latency", len(axes) * len(SHARES), unit="shapes") as progress:
        for one in axes:
            for share in SHARES:
                try:
                    shape = candidates(config, float(share), axis=one, metric="parameters", length=length)[0]
                except ConfigError:
                    break  # there is no smaller shape
                progress.advance()
                kept = (*range(shape.n_layers - 1), config.n_layers - 1)
                if decode_s(shaped(config, shape, kept)) <= keep * whole:
                    found.append(shape)
                    break
    if not found:
        raise ConfigError(f"no shape decodes a token in {keep:.0%} of the time; give a --ratio below {1 - keep:g}")
    return found


def decode_s(config: ModelConfig) -> float:
    """Seconds to decode one token of a single row, measured on a model with random parameters."""
    n_new = min(32, config.max_length // 2)
    prompt = min(128, config.max_length - n_new)
    model = Decoder(config, rngs=nnx.Rngs(0))
    return measure_latency(model, batch=1, prompt_length=prompt, n_new=n_new)[1].s_per_token
