"""FLOPs of one token, counted from the modules of a model; nothing is run.

Conventions, printed wherever a figure is:

- a multiply-add is 2 FLOPs, and only products count: norms, softmax and rotations are a few per cent and left out;
- every parameter matrix is multiplied with every token once, of experts those that a token goes to, of routed depth as
  often as it passes on average; a look-up table is free; the head counts, tied or not;
- layers that training leaves out count by their expected number, where the steps of the run are given;
- attention in training and prefill counts the keys that the causal mask and the window leave visible, on average
  (length + 1) / 2 without a window: the usual "causal halved". Rows count as one document each, so that packing
  changes nothing;
- a component of a fork states its other products, or they are counted from its trace, masked pairs included;
- the backward pass costs twice the forward pass (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).

*Model* FLOPs are what the mathematics needs (for MFU); *hardware* FLOPs are what the program computes (for HFU).
"""

import functools
import math
from collections.abc import Callable

from flax import nnx

from efftrain.errors import ConfigError
from efftrain.measure.cost.layer_flops import matrix_flops, other_flops
from efftrain.models.config import AttentionConfig, BlockConfig, ModelConfig
from efftrain.models.stack import mean_kept

FORWARD_AND_BACKWARD = 3  # in forward passes


def training_flops(model: nnx.Module, length: int, *, steps: int | None = None) -> float:
    """Model FLOPs of a training token, forward and backward, in rows of ``length`` tokens.

    Args:
      model: abstract or not; it has a ``config``. A block's matrices count wherever they are, a fork's too.
      length: tokens of a row.
      steps: of the run, for layers that it leaves out. None: every layer counts.
    """
    blocks = matrix_flops(model) + _visible_attention_flops(model, length)
    kept = 1.0 if steps is None else mean_kept(model.config.n_layers, model.config.layer_dropout, steps)
    return FORWARD_AND_BACKWARD * (kept * blocks + head_flops(model))


def training_hardware_flops(model: nnx.Module, length: int) -> float:
    """FLOPs that the program spends on a training token: with the masked pairs that it computes, and with remat.

    Every layer counts, those too that a step may leave out. Remat "full" runs the blocks forward once more (their last
    product, which the backward pass does not need, is counted too), "dots" only the attention products. The head is
    outside of remat.
    """
    config = model.config
    attention = _attention_flops(config, length, _computed_keys)
    again = {"none": 0.0, "dots": attention, "full": matrix_flops(model) + attention}[config.remat]
    return FORWARD_AND_BACKWARD * (matrix_flops(model) + head_flops(model) + attention) + again


def prefill_flops(model: nnx.Module, length: int) -> float:
    """FLOPs per token of reading a prompt of ``length`` tokens; the head is applied to the last one only."""
    return matrix_flops(model) + head_flops(model) / length + _visible_attention_flops(model, length)


def decode_flops(model: nnx.Module, context: int) -> float:
    """Model FLOPs of drawing one token that sees ``context`` tokens, itself included, or as many as the window lets it.

    The program computes a score for every slot of the cache, seen or not.
    """
    attention = _attention_flops(model.config, context, lambda seen, a: min(seen, _window(a) or seen))
    return matrix_flops(model) + head_flops(model) + attention


def head_flops(model: nnx.Module) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * model.config.d_model * model.config.vocab_size


def attention_flops(attention: AttentionConfig, keys: float) -> float:
    """FLOPs of one token's scores and weighted values against ``keys`` keys in one layer, forward, as it states them.

    Raises:
      ConfigError: it does not state them.
    """
    stated = attention.score_flops(keys)
    if stated is None:
        raise ConfigError(f"{type(attention).__name__} does not state its FLOPs; give it a method score_flops")
    return stated


def mean_visible_keys(length: int, window: int | None) -> float:
    """Keys that a token of a row sees, itself included, averaged over the row: the mean of min(i + 1, window)."""
    seen = min(length, window or length)
    return seen - seen * (seen - 1) / (2 * length)


def mean_computed_keys(length: int, window: int | None, n_blocks: int) -> float:
    """Keys that ``ops.attention.causal_attention`` computes a score for, averaged over the row."""
    size = math.ceil(length / min(n_blocks, length))
    pairs = 0
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - window + 1) if window else 0
        pairs += (stop - start) * (stop - first)
    return pairs / length


def _computed_keys(length: int, attention: AttentionConfig) -> float:
    return mean_computed_keys(length, _window(attention), getattr(attention, "n_blocks", 1))


def _visible_attention_flops(model: nnx.Module, length: int) -> float:
    return _attention_flops(model.config, length, lambda seen, a: mean_visible_keys(seen, _window(a)))


def _attention_flops(config: ModelConfig, length: int, keys: Callable[[int, AttentionConfig], float]) -> float:
    """Of a token, in all layers, and of what else they compute beside matrices; where a share of a row passes a layer,
    its tokens see each other only."""

    @functools.cache
    def of_layer(layer: BlockConfig, seen: int) -> float:
        return other_flops(layer, config, seen, keys(seen, layer.attention))

    return sum(
        share * of_layer(layer, max(round(share * length), 1))
        for layer in config.layers
        for share in layer.depth.passes()
    )


def _window(attention: AttentionConfig) -> int | None:
    return getattr(attention, "window", None)
