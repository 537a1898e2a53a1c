"""What leaving the stack early costs and saves: quality, depth and seconds over thresholds, and where layers go."""

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

from efftrain.measure.speculation import timed
from efftrain.measure.token_classes import CLASSES
from efftrain.models.decode import AllLayers, draw_tokens, read_prompts
from efftrain.models.decoder import Decoder
from efftrain.models.early_exit import ConfidenceExit, Probe, confidence, exit_states, fit_probe
from efftrain.models.routed_depth import RoutedDepth, causally_routed
from efftrain.models.sampling import GREEDY
from efftrain.ops.cross_entropy import token_nll
from efftrain.progress import Progress

RULES = ("similarity", "gap", "probe")
# Quantiles of the confidence at which thresholds are tried, from all layers for nearly all tokens to few layers.
QUANTILES = (0.999, 0.99, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)

Rows = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Text:
    """What tokens stand for: a class (index into ``token_classes.CLASSES``), and bytes; (vocabulary,) int32 each."""

    classes: np.ndarray
    token_bytes: np.ndarray


def tune(model: Decoder, rows: Rows) -> dict[str, Any]:
    """What a curve needs, from rows that it does not see; as JSON.

    Returns:
      ``probe``: its arrays; ``thresholds``: for each rule, quantiles of the confidences that occur, careful ones first.
    """
    n = model.config.n_layers

    @jax.jit
    def states(row: Mapping[str, Array]) -> tuple[Array, Array, Array]:
        x_btd, exit_ebtd, _ = model.states(
            row["tokens"], segments_bt=row["segments"], positions_bt=row["positions"], exits_e=jnp.arange(n - 1)
        )
        first_btd = model.embedding(row["tokens"])
        before = [first_btd, *exit_ebtd]
        wanted = model.exit_logits(x_btd).argmax(-1)
        agree = jnp.stack([model.exit_logits(x).argmax(-1) == wanted for x in exit_ebtd])
        measured = {
            rule: jnp.stack([confidence(model, rule, None, before[e], exit_ebtd[e], e + 1) for e in range(n - 1)])
            for rule in ("similarity", "gap")
        }
        return model.norm(exit_ebtd), agree, measured

    hidden, agree, measured = [], [], {"similarity": [], "gap": []}
    with Progress("probe", len(rows), unit="rows") as progress:
        for row in rows:
            mask = np.asarray(row["mask"])[0]
            h, a, m = states({k: row[k] for k in ("tokens", "segments", "positions")})
            hidden.append(np.asarray(h[:, 0])[:, mask])
            agree.append(np.asarray(a[:, 0])[:, mask])
            for rule, values in m.items():
                measured[rule].append(np.asarray(values[:, 0])[:, mask])
            progress.advance()
    hidden, agree = np.concatenate(hidden, axis=1), np.concatenate(agree, axis=1)
    probe = fit_probe(jnp.asarray(hidden), jnp.asarray(agree))
    logits = np.stack([probe(jnp.asarray(hidden[e]), e + 1) for e in range(n - 1)])
    measured = {rule: np.concatenate(values, axis=1) for rule, values in measured.items()}
    measured["probe"] = np.asarray(jax.nn.sigmoid(logits))
    return {
        "probe": {"kernel_ed": np.asarray(probe.kernel_ed).tolist(), "bias_e": np.asarray(probe.bias_e).tolist()},
        "thresholds": {rule: np.quantile(measured[rule], QUANTILES).tolist() for rule in RULES},
    }


def full_choices(model: Decoder, rows: Rows) -> list[Array]:
    """For each row, the likeliest next tokens (1, length) when all layers are computed."""

    @jax.jit
    def choose(row: Mapping[str, Array]) -> Array:
        x_btd, _, _ = model.states(row["tokens"], segments_bt=row["segments"], positions_bt=row["positions"])
        return model.exit_logits(x_btd).argmax(-1)

    return [choose({k: row[k] for k in ("tokens", "segments", "positions")}) for row in rows]


def measure_exit(
    model: Decoder,
    rows: Rows,
    full: Sequence[Array],
    text: Text,
    exit_: ConfidenceExit,
    threshold: float,
    probe: Probe,
) -> dict[str, Any]:
    """One point of a curve; as JSON.

    Args:
      model, rows: measured on.
      full: ``full_choices`` of them.
      text: of the vocabulary.
      exit_, threshold, probe: see ``early_exit.exit_states``.

    Returns:
      ``bpb``; ``differs``, the share of tokens that are not those of all layers, and ``row_losses``, the same for each
      row; mean depth and histograms by class of the token that is predicted.
    """
    graph, state = nnx.split(model)
    totals, losses = None, []
    for row, full_bt in zip(rows, full, strict=True):
        part = {k: row[k] for k in ("tokens", "targets", "segments", "positions", "mask")}
        differs, *sums = _row_with_exits(
            graph,
            state,
            part,
            full_bt,
            exit_,
            threshold,
            probe,
            jnp.asarray(text.classes),
            jnp.asarray(text.token_bytes),
        )
        losses.append(float(differs))
        sums = [np.asarray(a, np.float64) for a in sums]
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
    nats, n_bytes, histogram_cl = totals
    return {
        "threshold": threshold,
        "bpb": float(nats / math.log(2) / n_bytes),
        "differs": statistics.fmean(losses),
        "row_losses": losses,
    } | _depths(histogram_cl)


@partial(jax.jit, static_argnums=(0, 4))
def _row_with_exits(graph, state, row, full_bt, exit_, threshold, probe, classes_v, token_bytes_v):
    """Share of tokens that differ from those of all layers; nats, bytes, and depths by class of the target."""
    model = nnx.merge(graph, state)
    where = {"segments_bt": row["segments"], "positions_bt": row["positions"]}
    found = exit_states(model, row["tokens"], exit_, threshold, probe=probe, **where)
    logits, mask_bt = model.exit_logits(found.x_btd), row["mask"]
    differs = ((logits.argmax(-1) != full_bt) & mask_bt).sum() / jnp.maximum(mask_bt.sum(), 1)
    nats = jnp.where(mask_bt, token_nll(logits, row["targets"]), 0).sum()
    n_bytes = jnp.where(mask_bt, token_bytes_v[row["targets"]], 0).sum()
    histogram = _histogram(found.layers_bt, classes_v[row["targets"]], mask_bt, model.config.n_layers)
    return differs, nats, n_bytes, histogram


def _histogram(layers_bt: Array, classes_bt: Array, mask_bt: Array, most: int) -> Array:
    """(classes, most + 1) float32: tokens of each class by the number of their layers."""
    cells = jnp.zeros((len(CLASSES), most + 1))
    return cells.at[classes_bt, layers_bt].add(mask_bt.astype(jnp.float32))


def _depths(histogram_cl: np.ndarray) -> dict[str, Any]:
    """Mean depth, by class too, and the shares of each class's tokens by depth."""
    numbers, by_class = np.arange(histogram_cl.shape[1]), histogram_cl.sum(1)
    there = [c for c in range(len(CLASSES)) if by_class[c]]
    return {
        "mean_depth": float(histogram_cl.sum(0) @ numbers / histogram_cl.sum()),
        "mean_depth_by_class": {CLASSES[c]: float(histogram_cl[c] @ numbers / by_class[c]) for c in there},
        "histogram_by_class": {CLASSES[c]: (histogram_cl[c] / by_class[c]).round(5).tolist() for c in there},
    }


def measure_seconds(
    model: Decoder, prompt_bp: np.ndarray, thresholds: Mapping[str, float], probe: Probe, n_new: int, rounds: int = 5
) -> dict[str, Any]:
    """Seconds of a token and mean depth in decoding, with all layers and with an exit by each rule, alternating.

    Args:
      prompt_bp: (batch, length) int32 without padding.
      thresholds: of each rule.
      probe: of the rule "probe".
      n_new: tokens behind each prompt.
      rounds: beyond one that warms up; the median counts.
    """
    graph, state = nnx.split(model)
    key, exits = jax.random.key(0), ConfidenceExit().places(model.config.n_layers)
    lengths = np.full(len(prompt_bp), prompt_bp.shape[1], np.int32)
    first, cache = read_prompts(graph, state, prompt_bp, lengths, key, n_new, GREEDY)
    runs = {"all layers": (AllLayers(), 0.0)}
    runs |= {rule: (ConfidenceExit(rule=rule, threshold=0.0, exits=exits), t) for rule, t in thresholds.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    layers: dict[str, float] = {}
    for _ in range(1 + rounds):
        for name, (depth, threshold) in runs.items():
            how = (GREEDY, depth, None, threshold, None, probe)
            (_, layers_b), s = timed(partial(draw_tokens, graph, state, first, cache, key, n_new, *how))
            times[name].append(s)
            layers[name] = float(layers_b.mean())
    return {
        name: {"s_per_token": statistics.median(s[1:]) / (n_new - 1), "mean_depth": layers[name]}
        for name, s in times.items()
    }


def routed_depths(model: Decoder, rows: Rows, text: Text) -> dict[str, Any]:
    """Layers of each token as decoding chooses them, by class of the target."""
    causal = causally_routed(model)
    most = sum(len(block.depth.passes()) for block in model.config.layers)

    @jax.jit
    def of_row(row: Mapping[str, Array], classes_v: Array) -> Array:
        x_btd = causal.embedding(row["tokens"])
        layers_bt = jnp.zeros(row["tokens"].shape, jnp.int32)
        for layer in causal.layers():
            if isinstance(layer, RoutedDepth):
                x_btd, more_bt = layer.depths(x_btd, row["positions"], row["segments"])
            else:
                (x_btd, _), more_bt = layer(x_btd, row["positions"], row["segments"]), 1
            layers_bt += more_bt
        return _histogram(layers_bt, classes_v[row["targets"]], row["mask"], most)

    total = 0
    with Progress("depths", len(rows), unit="rows") as progress:
        for row in rows:
            part = {k: row[k] for k in ("tokens", "targets", "segments", "positions", "mask")}
            total = total + np.asarray(of_row(part, jnp.asarray(text.classes)), np.float64)
            progress.advance()
    return _depths(total)
