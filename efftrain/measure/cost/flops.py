"""FLOPs per token, counted from the modules of a model without running it.

Conventions, printed with every figure:

- a multiply-add is 2 FLOPs, and only products count: norms, softmax and rotations are a few per cent and left out;
- every token is multiplied once with every parameter matrix; of experts, only with those that it is routed to; of
  blocks with routed depth, as often as it passes them on average. A look-up table is free. The head counts, tied or
  not;
- layers that training drops count by their expected number, if the number of steps of the run is given;
- attention in training and prefill counts the keys that the causal mask and the window leave visible, on average
  (length + 1) / 2 without a window: the usual "causal halved". A row counts as one document, so that packing changes
  nothing;
- a component of a fork states its other products; otherwise they are counted from its trace, with masked pairs;
- the backward pass costs twice the forward pass (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).

*Model* FLOPs are what the mathematics needs (for MFU); *hardware* FLOPs are what the program computes (for HFU).
"""

import functools
import math
from collections.abc import Callable

from efftrain.errors import ConfigError
from efftrain.measure.cost.layer_flops import matrix_flops, other_flops
from efftrain.models.config import AttentionConfig, BlockConfig, ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.models.stack import mean_kept

FORWARD_AND_BACKWARD = 3  # cost of a forward and a backward pass, in forward passes


def training_flops(model: Decoder, length: int, *, steps: int | None = None) -> float:
    """Model FLOPs per training token, forward and backward, in rows of ``length`` tokens.

    Args:
      model: a model with a ``config``, abstract or not. All matrices in a block count, also those of a fork's modules.
      length: tokens of a row.
      steps: number of steps of the run, for layer dropout. None: every layer counts.
    """
    blocks = matrix_flops(model) + _visible_attention_flops(model, length)
    kept = 1.0 if steps is None else mean_kept(model.config.n_layers, model.config.layer_dropout, steps)
    return FORWARD_AND_BACKWARD * (kept * blocks + head_flops(model))


def training_hardware_flops(model: Decoder, length: int) -> float:
    """Hardware FLOPs per training token, including masked pairs that the program computes and the work of remat.

    Every layer counts, also if layer dropout may drop it in a step. Remat "full" runs the blocks forward once more
    (their last product is counted too, although the backward pass does not need it), "dots" only the attention
    products. The head is outside of remat.
    """
    config = model.config
    attention = _attention_flops(config, length, _computed_keys)
    again = {"none": 0.0, "dots": attention, "full": matrix_flops(model) + attention}[config.remat]
    return FORWARD_AND_BACKWARD * (matrix_flops(model) + head_flops(model) + attention) + again


def prefill_flops(model: Decoder, length: int) -> float:
    """Model FLOPs per token of reading a prompt of ``length`` tokens; the head is applied only to the last token."""
    return matrix_flops(model) + head_flops(model) / length + _visible_attention_flops(model, length)


def decode_flops(model: Decoder, context: int) -> float:
    """Model FLOPs of decoding one token that sees ``context`` tokens, including itself and limited by the window.

    The program itself computes a score for every slot of the cache, visible or not.
    """
    attention = _attention_flops(model.config, context, lambda seen, a: min(seen, _window(a) or seen))
    return matrix_flops(model) + head_flops(model) + attention


def head_flops(model: Decoder) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * model.config.d_model * model.config.vocab_size


def attention_flops(attention: AttentionConfig, keys: float) -> float:
    """Forward FLOPs of one token's scores and weighted values for ``keys`` keys in one layer.

    Raises:
      ConfigError: the attention does not state its FLOPs.
    """
    stated = attention.score_flops(keys)
    if stated is None:
        raise ConfigError(f"{type(attention).__name__} does not state its FLOPs; give it a method score_flops")
    return stated


def mean_visible_keys(length: int, window: int | None) -> float:
    """Mean number of keys that a token of a row sees, including itself: the mean of min(i + 1, window) over the row."""
    seen = min(length, window or length)
    return seen - seen * (seen - 1) / (2 * length)


def mean_computed_keys(length: int, window: int | None, n_blocks: int) -> float:
    """Mean number of keys for which ``ops.attention.causal_attention`` computes a score, over the tokens of a row."""
    size = math.ceil(length / min(n_blocks, length))
    pairs = 0
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = max(0, start - window + 1) if window else 0
        pairs += (stop - start) * (stop - first)
    return pairs / length


def _computed_keys(length: int, attention: AttentionConfig) -> float:
    return mean_computed_keys(length, _window(attention), getattr(attention, "n_blocks", 1))


def _visible_attention_flops(model: Decoder, length: int) -> float:
    return _attention_flops(model.config, length, lambda seen, a: mean_visible_keys(seen, _window(a)))


def _attention_flops(config: ModelConfig, length: int, keys: Callable[[int, AttentionConfig], float]) -> float:
    """FLOPs per token, in all layers, of attention and all else that they compute beside their matrices.

    If only a share of a row's tokens passes a layer, these tokens see only each other.
    """

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
