"""Importance of the parts of a model on calibration text: units, heads, hidden channels, experts and layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.compress.layerwise.calibration import CalibrationRows, CalibrationSize, Tap, inputs_of, keep_saliency
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.structured.shape import head_parts
from efftrain.errors import ConfigError
from efftrain.models.config import Attention, BlockConfig, Full, ModelConfig, PreNorm, standard_attention
from efftrain.models.mlp import FeedForward
from efftrain.models.moe.layer import RoutedExperts
from efftrain.models.norms import RMS
from efftrain.models.positions import Rotary
from efftrain.progress import Progress

SAMPLE = 8192  # maximum number of tokens whose residual stream is compared between layers
NORMS = ("attention_norm", "mlp_norm")


@dataclass(frozen=True)
class Importance:
    """Importance of the parts of a model, from one pass over calibration text; padding is not counted.

    The importance of a channel is ``sqrt(sum over rows of (mean over tokens of |a|) ** 2)``, where a is its activation.

    Attributes:
      ffn: for each layer (d_ff,), the importance of the inputs of its ``down`` product; None if the layer has no dense
        feed-forward part.
      heads: for each layer (n_kv_heads,), the L2 norm of the importance of the inputs of its ``out`` product over all
        query heads of a group. For a layer with one group (n_heads,), the norm over each query head.
      experts: for each layer (n_experts,), the gate times the norm of the expert's output, summed over the tokens that
        are routed to it and divided by the number of all tokens, so that an expert that is rarely chosen counts little.
        None if the layer has no experts.
      hidden: (d_model,), the importance of the outputs of the norms, summed over all norms.
      moments: for each norm, by a name such as ``blocks/3/mlp_norm`` or ``norm``, the mean over tokens of its squared
        input, (d_model,).
      cosines: (n_layers + 1, n_layers + 1), the mean over tokens of the cosine between the residual streams before the
        layers i and j; index n_layers is the stream after the last layer.
      length: tokens of a calibration row.
      calibration: the amount of calibration text.

    Source: Muralidharan et al. 2024 (Minitron), section 2.2; experts: Lasby et al. 2025 (REAP), there divided by the
    tokens of the expert.
    """

    ffn: tuple[np.ndarray | None, ...]
    heads: tuple[np.ndarray, ...]
    experts: tuple[np.ndarray | None, ...]
    hidden: np.ndarray
    moments: Mapping[str, np.ndarray]
    cosines: np.ndarray
    length: int
    calibration: CalibrationSize

    def block_influence(self, first: int, n: int) -> float:
        """How far the ``n`` layers from ``first`` on rotate the residual stream: 1 - mean cosine.

        Source: Men et al. 2024 (ShortGPT), equation 1.
        """
        return float(1 - self.cosines[first, first + n])


def importance(pieces: LayerwiseModel, calibration: CalibrationRows) -> Importance:
    """Computes the importance of a model's parts by running calibration text through it, layer by layer.

    Args:
      pieces: a float model, taken apart; not changed.
      calibration: the text. Minitron uses 1024 rows.

    Raises:
      ConfigError: see ``check_prunable``.
    """
    check_prunable(pieces.config)
    x_ntd = np.array(inputs_of(pieces.outer, calibration))  # a copy, because each layer overwrites its input
    n_tokens = calibration.size.tokens
    sample = _sample(calibration)
    directions = [_directions(x_ntd, sample)]
    ffn, heads, experts, hidden, moments = [], [], [], np.zeros(x_ntd.shape[-1]), {}
    with Progress("importance", len(pieces.layers), unit="layers") as progress:
        for number, (layer, block) in enumerate(zip(pieces.layers, pieces.config.layers, strict=True)):
            sums = _pass(_observe, layer, x_ntd, calibration)
            ffn.append(np.sqrt(sums["ffn"]) if "ffn" in sums else None)
            heads.append(
                np.sqrt(sums["heads"].reshape(head_parts(standard_attention(block, "importance")), -1).sum(-1))
            )
            experts.append(sums["experts"] / n_tokens if "experts" in sums else None)
            for name in NORMS:
                hidden += np.sqrt(sums[name]["rows"])
                moments[f"blocks/{number}/{name}"] = sums[name]["squares"] / n_tokens
            directions.append(_directions(x_ntd, sample))
            progress.advance()
        last = _pass(_observe_norm, pieces.outer.norm, x_ntd, calibration)
    return Importance(
        ffn=tuple(ffn),
        heads=tuple(heads),
        experts=tuple(experts),
        hidden=hidden + np.sqrt(last["rows"]),
        moments=moments | {"norm": last["squares"] / n_tokens},
        cosines=np.array([[np.vdot(a, b) / len(sample) for b in directions] for a in directions]),
        length=calibration.tokens.shape[1],
        calibration=calibration.size,
    )


def check_prunable(config: ModelConfig) -> None:
    """Raises ``ConfigError`` for models that cannot be cut.

    Those are models that are stored quantised, that have learned steps, or in which not every token passes every layer.
    """
    if config.quantization.stored:
        raise ConfigError("the model is converted already; prune the one it was made from")
    if any(rule.learned_step for rule in config.quantization.rules):
        raise ConfigError(
            "quantization.rules has learned_step, and learned steps are those of whole matrices; prune the float model "
            "and train the smaller one for quantisation"
        )
    if config.norm != RMS():
        raise ConfigError(
            f"model.norm is {config.norm}, whose output is not scaled as a cut corrects it; prune a model with RMS()"
        )
    for i, block in enumerate(config.layers):
        check_standard(block, i)
        if block.depth != Full():
            raise ConfigError(
                f"layer {i} has the depth policy {type(block.depth).__name__}; prune a model in which every token "
                "passes every layer (Full)"
            )


def check_standard(block: BlockConfig, i: int) -> None:
    """Raises ``ConfigError`` for other attention, positions, scores or residuals than those of ``llama``."""
    attention = block.attention
    parts = [attention, block.residual, *([attention.position] if type(attention) is Attention else [])]
    own: list[object] = [
        part for part, kind in zip(parts, (Attention, PreNorm, Rotary), strict=False) if type(part) is not kind
    ]
    own += [attention.score_mod] if type(attention) is Attention and attention.score_mod is not None else []
    if own:
        raise ConfigError(
            f"layer {i} has {type(own[0]).__name__}, whose heads and channels cannot be cut; prune a model with "
            "Attention, Rotary and PreNorm"
        )
    if type(attention) is Attention and attention.qk_norm == "full":
        raise ConfigError(
            f"layer {i} has attention.qk_norm 'full', a norm over all heads that cannot be cut; prune a model that "
            "normalises each head (True) or none"
        )


@partial(jax.jit, static_argnums=0)
def _observe(graph, state, x_btd, positions_bt, segments_bt) -> tuple[Array, dict]:
    """A layer's output, and the sums over rows from which importance is computed."""
    layer, valid_bt = nnx.merge(graph, state), segments_bt > 0
    norms = {name: Tap(layer, name, valid_bt) for name in NORMS}
    out, down = Tap(layer.attention, "out", valid_bt), None
    if isinstance(layer.mlp, FeedForward):
        down = Tap(layer.mlp, "down", valid_bt)
    elif isinstance(layer.mlp, RoutedExperts):
        keep_saliency(layer.mlp)
    x_btd, metrics = layer(x_btd, positions_bt, segments_bt)
    sums: dict[str, Any] = {name: _norm_sums(tap, valid_bt) for name, tap in norms.items()}
    sums["heads"] = _row_means(out.read_btd, valid_bt)
    if down is not None:
        sums["ffn"] = _row_means(down.read_btd, valid_bt)
    if isinstance(layer.mlp, RoutedExperts):
        sums["experts"] = metrics["statistics"]["saliency"]
    return x_btd, sums


@partial(jax.jit, static_argnums=0)
def _observe_norm(graph, state, x_btd, positions_bt, segments_bt) -> tuple[Array, dict]:
    holder: Any = nnx.Module()
    holder.norm = nnx.merge(graph, state)
    tap = Tap(holder, "norm", segments_bt > 0)
    return tap(x_btd), _norm_sums(tap, segments_bt > 0)


def _norm_sums(tap: Tap, valid_bt: Array) -> dict[str, Array]:
    squares_d = jnp.square(tap.read_btd.astype(jnp.float32)).sum((0, 1))
    return {"rows": _row_means(tap.given_btd, valid_bt), "squares": squares_d}


def _row_means(a_btd: Array, valid_bt: Array) -> Array:
    """The sum over rows of the squared mean of |a| over tokens, (d,); a must be zero at padding."""
    n_b1 = jnp.maximum(valid_bt.sum(-1, keepdims=True), 1)
    return jnp.square(jnp.abs(a_btd.astype(jnp.float32)).sum(1) / n_b1).sum(0)


def _pass(observe, module: nnx.Module, x_ntd: np.ndarray, calibration: CalibrationRows) -> dict:
    """The sums over all rows; overwrites ``x_ntd`` with the module's output."""
    graph, state = nnx.split(module)
    sums: dict | None = None
    for rows in calibration.batches():
        x_btd, more = observe(graph, state, x_ntd[rows], calibration.positions[rows], calibration.segments[rows])
        x_ntd[rows] = x_btd
        more = jax.tree.map(lambda a: np.asarray(a, np.float64), more)
        sums = more if sums is None else jax.tree.map(np.add, sums, more)
    assert sums is not None  # calibration text has rows
    return sums


def _sample(calibration: CalibrationRows) -> np.ndarray:
    """Indices of at most ``SAMPLE`` tokens in the flattened rows, evenly spaced, without padding."""
    real = np.flatnonzero(calibration.segments.reshape(-1) > 0)
    return real[np.linspace(0, len(real) - 1, min(len(real), SAMPLE)).astype(int)]


def _directions(x_ntd: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """The sampled vectors, scaled to length 1: (tokens, d_model) float32."""
    x_nd = x_ntd.reshape(-1, x_ntd.shape[-1])[sample].astype(np.float32)
    return x_nd / np.maximum(np.linalg.norm(x_nd, axis=-1, keepdims=True), 1e-30)
