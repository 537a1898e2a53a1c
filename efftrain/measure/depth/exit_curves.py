"""Curves of early exits: quality, mean depth and seconds over confidence thresholds, and depths by class of token."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from efftrain.measure.depth.speculation import timed
from efftrain.measure.quality.row_documents import Rows, losses_by_document
from efftrain.measure.quality.token_classes import CLASSES
from efftrain.models.decoder import Decoder
from efftrain.models.decoding.generate import AllLayers, Depth, decode_tokens, read_prompts
from efftrain.models.decoding.sampling import GREEDY
from efftrain.models.decoding.unrolled import unrolled
from efftrain.models.depth.early_exit import ConfidenceExit, ExitProbe, Rule, confidence, exit_states, fit_exit_probe
from efftrain.models.depth.routed_depth import RoutedDepth, causally_routed
from efftrain.ops.cross_entropy import token_nll
from efftrain.progress import Progress

RULES: tuple[Rule, ...] = ("similarity", "gap", "probe")
# Quantiles of the confidence that are tried as thresholds, from nearly all tokens with all layers to few layers.
QUANTILES = (0.999, 0.99, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)

MAX_PROBE_TOKENS = 20_000  # number of tokens after which no more batches are read to train the probes

ROW = ("tokens", "targets", "segments", "positions", "mask")


@dataclass(frozen=True)
class TokenTable:
    """Class and bytes of each token of the vocabulary.

    Attributes:
      classes: (vocabulary,) indices into ``token_classes.CLASSES``.
      token_bytes: (vocabulary,) bytes of text.
    """

    classes: np.ndarray
    token_bytes: np.ndarray


def tune(model: Decoder, rows: Rows) -> dict[str, Any]:
    """Fits the exit probe and finds the thresholds to try, on rows that are not used for the curves.

    Args:
      model: the model.
      rows: batches of rows.

    Returns:
      As JSON: ``probe``, the arrays of the probe; ``thresholds``, for each rule the ``QUANTILES`` of its confidences,
      the safest first; ``tokens``, the number of tokens that both were computed from.
    """
    n = model.config.n_layers
    graph, state = nnx.split(model)

    @jax.jit
    def states(state: nnx.State, row: Mapping[str, Array]) -> tuple[Array, Array, dict[str, Array]]:
        model = nnx.merge(graph, state)
        x_btd, exit_ebtd, _ = model.states(
            row["tokens"], segments_bt=row["segments"], positions_bt=row["positions"], exits_e=jnp.arange(n - 1)
        )
        assert exit_ebtd is not None  # asked for with exits_e
        before = [model.embed(row["tokens"], row["positions"]), *exit_ebtd]
        wanted = model.exit_logits(x_btd).argmax(-1)
        agree = jnp.stack([model.exit_logits(x).argmax(-1) == wanted for x in exit_ebtd])
        measured = {
            rule: jnp.stack([confidence(model, rule, None, before[e], exit_ebtd[e], e + 1) for e in range(n - 1)])
            for rule in ("similarity", "gap")
        }
        return model.norm(exit_ebtd), agree, measured

    parts: dict[str, list[np.ndarray]] = {"hidden": [], "agree": [], "similarity": [], "gap": []}
    with Progress("probe", len(rows), unit="batches") as progress:
        for row in rows:
            mask_bt = np.asarray(row["mask"])
            hidden, agree, measured = states(state, {k: row[k] for k in ROW})
            for name, values in {"hidden": hidden, "agree": agree, **measured}.items():
                parts[name].append(np.asarray(values)[:, mask_bt])
            progress.advance()
            if sum(a.shape[1] for a in parts["agree"]) >= MAX_PROBE_TOKENS:
                break
    found = {name: np.concatenate(arrays, axis=1) for name, arrays in parts.items()}
    probe = fit_exit_probe(jnp.asarray(found["hidden"]), jnp.asarray(found["agree"]))
    logits = np.stack([probe(jnp.asarray(found["hidden"][e]), e + 1) for e in range(n - 1)])
    found["probe"] = np.asarray(jax.nn.sigmoid(logits))
    return {
        "probe": {"kernel_ed": np.asarray(probe.kernel_ed).tolist(), "bias_e": np.asarray(probe.bias_e).tolist()},
        "thresholds": {rule: np.quantile(found[rule], QUANTILES).tolist() for rule in RULES},
        "tokens": found["agree"].shape[1],
    }


def full_choices(model: Decoder, rows: Rows) -> list[Array]:
    """For each batch of rows, the most probable next tokens (batch, length) if all layers are computed."""
    graph, state = nnx.split(model)

    @jax.jit
    def choose(state: nnx.State, row: Mapping[str, Array]) -> Array:
        model = nnx.merge(graph, state)
        x_btd, _, _ = model.states(row["tokens"], segments_bt=row["segments"], positions_bt=row["positions"])
        return model.exit_logits(x_btd).argmax(-1)

    return [choose(state, {k: row[k] for k in ROW}) for row in rows]


def measure_exit(
    model: Decoder,
    rows: Rows,
    full: Sequence[Array],
    text: TokenTable,
    exit_: ConfidenceExit,
    threshold: float,
    probe: ExitProbe,
) -> dict[str, Any]:
    """Measures one point of a curve: quality and depth with a confidence threshold.

    Args:
      model: the model.
      rows: batches of rows with ``documents``, see ``row_documents.with_documents``.
      full: ``full_choices`` of these rows.
      text: classes and bytes of the vocabulary.
      exit_, threshold, probe: see ``early_exit.exit_states``.

    Returns:
      As JSON: ``threshold``; ``bpb``; ``document_losses``, for each document the share of the predicted tokens that
      differ from those with all layers, and ``differs``, their mean; the mean depth, and mean depths and histograms by
      class of the target.
    """
    graph, state = nnx.split(model)
    totals: list[np.ndarray] = []
    differs = []
    for row, full_bt in zip(rows, full, strict=True):
        differs_bt, *sums = _row_with_exits(
            graph, state, {k: row[k] for k in ROW}, full_bt, exit_, threshold, probe, text.classes
        )
        differs.append(np.asarray(differs_bt))
        sums = [np.asarray(a, np.float64) for a in sums]
        totals = sums if not totals else [a + b for a, b in zip(totals, sums, strict=True)]
    nats, histogram_cl = totals
    counted, documents = (np.concatenate([row[name] for row in rows]) for name in ("mask", "documents"))
    losses = losses_by_document(np.concatenate(differs), counted, documents).tolist()
    n_bytes = sum(text.token_bytes[np.asarray(row["targets"])[np.asarray(row["mask"])]].sum() for row in rows)
    return {
        "threshold": threshold,
        "bpb": float(nats / math.log(2) / n_bytes),
        "differs": statistics.fmean(losses),
        "document_losses": losses,
    } | _depths(histogram_cl)


@partial(jax.jit, static_argnums=(0, 4))
def _row_with_exits(graph, state, row, full_bt, exit_, threshold, probe, classes_v):
    """Which predictions differ from those with all layers, (batch, length) bool; sum of nats; depths by class."""
    model = nnx.merge(graph, state)
    where = {"segments_bt": row["segments"], "positions_bt": row["positions"]}
    found = exit_states(model, row["tokens"], exit_, threshold, probe=probe, **where)
    logits, mask_bt = model.exit_logits(found.x_btd), row["mask"]
    nats = jnp.where(mask_bt, token_nll(logits, row["targets"]), 0).sum()
    histogram = _histogram(found.layers_bt, classes_v[row["targets"]], mask_bt, model.config.n_layers)
    return logits.argmax(-1) != full_bt, nats, histogram


def _histogram(layers_bt: Array, classes_bt: Array, mask_bt: Array, most: int) -> Array:
    """Numbers of tokens by class and number of layers, (classes, most + 1) float32."""
    cells = jnp.zeros((len(CLASSES), most + 1))
    return cells.at[classes_bt, layers_bt].add(mask_bt.astype(jnp.float32))


def _depths(histogram_cl: np.ndarray) -> dict[str, Any]:
    """The number of tokens, the mean depth, and for each class its mean depth and histogram of depths."""
    numbers, by_class = np.arange(histogram_cl.shape[1]), histogram_cl.sum(1)
    there = [c for c in range(len(CLASSES)) if by_class[c]]
    return {
        "tokens": int(histogram_cl.sum()),
        "mean_depth": float(histogram_cl.sum(0) @ numbers / histogram_cl.sum()),
        "mean_depth_by_class": {CLASSES[c]: float(histogram_cl[c] @ numbers / by_class[c]) for c in there},
        "histogram_by_class": {CLASSES[c]: (histogram_cl[c] / by_class[c]).round(5).tolist() for c in there},
    }


def measure_seconds(
    model: Decoder,
    prompt_bp: np.ndarray,
    thresholds: Mapping[Rule, float],
    probe: ExitProbe,
    n_new: int,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measures seconds per token and mean depth of decoding, with all layers and with early exits by each rule.

    Args:
      model: the model.
      prompt_bp: tokens of the prompts, (batch, length) int32, without padding.
      thresholds: threshold of each rule.
      probe: probe of the rule "probe".
      n_new: number of tokens that are generated after each prompt.
      rounds: number of rounds after one round to warm up; the settings alternate, and the median is taken.

    Returns:
      ``s_per_token`` and ``mean_depth`` for "all layers" and for each rule.
    """
    graph, state = nnx.split(unrolled(model))
    key, exits = jax.random.key(0), ConfidenceExit().exit_layers(model.config.n_layers)
    lengths = np.full(len(prompt_bp), prompt_bp.shape[1], np.int32)
    first, cache = read_prompts(graph, state, prompt_bp, lengths, key, n_new, GREEDY)
    runs: dict[str, tuple[Depth, float]] = {"all layers": (AllLayers(), 0.0)}
    runs |= {rule: (ConfidenceExit(rule=rule, threshold=0.0, exits=exits), t) for rule, t in thresholds.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    layers: dict[str, float] = {}
    for _ in range(1 + rounds):
        for name, (depth, threshold) in runs.items():
            how = (GREEDY, depth, None, threshold, None, probe)
            (_, layers_b, _), s = timed(partial(decode_tokens, graph, state, first, cache, key, n_new, *how))
            times[name].append(s)
            layers[name] = float(layers_b.mean())
    return {
        name: {"s_per_token": statistics.median(s[1:]) / (n_new - 1), "mean_depth": layers[name]}
        for name, s in times.items()
    }


def routed_depths(model: Decoder, rows: Rows, text: TokenTable) -> dict[str, Any]:
    """Depths of a model of routed depth, as decoding chooses them, by class of the target; see ``measure_exit``."""
    graph, state = nnx.split(causally_routed(model))
    most = sum(len(block.depth.passes()) for block in model.config.layers)

    @jax.jit
    def of_row(state: nnx.State, row: Mapping[str, Array], classes_v: Array) -> Array:
        causal = nnx.merge(graph, state)
        x_btd = causal.embed(row["tokens"], row["positions"])
        layers_bt = jnp.zeros(row["tokens"].shape, jnp.int32)
        for layer in causal.layers():
            if isinstance(layer, RoutedDepth):
                x_btd, more_bt = layer.depths(x_btd, row["positions"], row["segments"], row["tokens"])
            else:
                (x_btd, _), more_bt = layer(x_btd, row["positions"], row["segments"], row["tokens"]), 1
            layers_bt += more_bt
        return _histogram(layers_bt, classes_v[row["targets"]], row["mask"], most)

    total = np.zeros(())
    with Progress("depths", len(rows), unit="rows") as progress:
        for row in rows:
            found = of_row(state, {k: row[k] for k in ROW}, jnp.asarray(text.classes))
            total = total + np.asarray(found, np.float64)
            progress.advance()
    return _depths(total)
