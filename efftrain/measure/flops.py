"""FLOPs of one token, counted from the modules of a model; nothing is run.

Conventions, printed wherever a figure is:

- a multiply-add is 2 FLOPs, and only products count: norms, softmax and rotations are a few per cent and left out;
- every parameter matrix is multiplied with every token once, of experts those that a token goes to, of routed depth as
  often as it passes on average; a look-up table is free; the head counts, tied or not;
- layers that training leaves out count by their expected number, where the steps of the run are given;
- attention in training and prefill counts the keys that the causal mask and the window leave visible, on average
  (length + 1) / 2 without a window: the usual "causal halved". Rows count as one document each, so that packing
  changes nothing;
- the backward pass costs twice the forward pass (Kaplan et al. 2020; Chowdhery et al. 2022, appendix B).

*Model* FLOPs are what the mathematics needs (for MFU); *hardware* FLOPs are what the program computes (for HFU).
"""

import math
from collections.abc import Callable

from flax import nnx

from efftrain.measure.parameters import HEAD, active_size, embedding_paths, parameters, passes
from efftrain.models.config import Attention, ModelConfig
from efftrain.models.depth import mean_kept

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
    attention = _attention_flops(config, length, lambda seen, a: mean_computed_keys(seen, a.window, a.n_blocks))
    again = {"none": 0.0, "dots": attention, "full": matrix_flops(model) + attention}[config.remat]
    return FORWARD_AND_BACKWARD * (matrix_flops(model) + head_flops(model) + attention) + again


def prefill_flops(model: nnx.Module, length: int) -> float:
    """FLOPs per token of reading a prompt of ``length`` tokens; the head is applied to the last one only."""
    return matrix_flops(model) + head_flops(model) / length + _visible_attention_flops(model, length)


def decode_flops(model: nnx.Module, context: int) -> float:
    """Model FLOPs of drawing one token that sees ``context`` tokens, itself included, or as many as the window lets it.

    The program computes a score for every slot of the cache, seen or not.
    """
    attention = _attention_flops(model.config, context, lambda seen, a: min(seen, a.window or seen))
    return matrix_flops(model) + head_flops(model) + attention


def matrix_flops(model: nnx.Module) -> float:
    """FLOPs of one token through all parameter matrices but the head, forward.

    A parameter is a matrix where it has two axes or more beside ``layers``.
    """
    free = embedding_paths(model) | {HEAD}
    return sum(
        2.0 * active_size(variable) * max(passes(variable), 1.0)
        for path, variable in parameters(model)
        if path[:-1] not in free and _is_matrix(variable)
    )


def head_flops(model: nnx.Module) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * model.config.d_model * model.config.vocab_size


def attention_flops(attention: Attention, keys: float) -> float:
    """FLOPs of one token's scores and weighted values against ``keys`` keys in one layer, forward."""
    return 4.0 * attention.n_heads * attention.d_head * keys


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


def _visible_attention_flops(model: nnx.Module, length: int) -> float:
    return _attention_flops(model.config, length, lambda seen, a: mean_visible_keys(seen, a.window))


def _attention_flops(config: ModelConfig, length: int, keys: Callable[[int, Attention], float]) -> float:
    """Of a token, in all layers; where a share of a row passes a layer, its tokens see each other only."""
    return sum(
        share * attention_flops(layer.attention, keys(max(round(share * length), 1), layer.attention))
        for layer in config.layers
        for share in layer.depth.passes()
    )


def _is_matrix(variable: nnx.Variable) -> bool:
    axes = variable.get_metadata().get("axes", ())
    return variable.ndim - ("layers" in axes) >= 2 and "groups" not in axes
