"""Measures and counts all figures of a model for its scorecard."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax

from efftrain.measure.cost.flops import decode_flops, training_flops
from efftrain.measure.cost.latency import Latency, measure_latency
from efftrain.measure.cost.memory import device_peak_bytes, host_peak_bytes
from efftrain.measure.cost.parameters import cache_bytes_per_token, count_parameters, stored_bytes
from efftrain.measure.scorecard.scorecard import Figure, Method, Scorecard, not_measured
from efftrain.models.decoder import Decoder
from efftrain.models.depth.routed_depth import routes_causally
from efftrain.models.zeros import pruned
from efftrain.progress import Progress
from efftrain.sharding import hosts
from efftrain.sharding.chips import find_chip
from efftrain.train.run.environment import environment

LATENCY_BATCHES = (1, 8)
DROPS = "experts drop tokens above their capacity, so that the figure depends on the rows that are evaluated together"
LOOKS_AHEAD = "the model chooses tokens by looking ahead, and cannot decode"


def score(
    model: Decoder,
    *,
    name: str,
    length: int,
    quality: Mapping[str, float] | None = None,
    split: str = "validation",
    note: str = "",
    training_tokens: int | None = None,
    training_figures: Mapping[str, float] | None = None,
    steps: int | None = None,
    extra_flops: float = 0.0,
    checkpoint: Path | None = None,
    prompt_length: int = 128,
    n_new: int = 32,
    rounds: int = 5,
) -> Scorecard:
    """Makes the scorecard of a model from its measured and counted figures.

    A figure that is not given or cannot be measured here is "not measured", with the reason. Call it outside of
    ``sharding.rules.use``; see ``latency``.

    Args:
      model: the model with its parameters.
      name: name of the model in the scorecard.
      length: tokens of a training row; training FLOPs are counted in such rows, and decoding FLOPs with such a context.
      quality: ``bpb`` and ``loss`` on held-out rows, see ``evaluate.Evaluator``. None: not measured.
      split, note: split of these rows, and what a reader must know about them.
      training_tokens: number of tokens that the whole run read, including padding. None: unknown.
      training_figures: figures of ``train.loop.TrainResult``. None: unknown.
      steps: number of steps of the whole run, see ``flops.training_flops``. None: every layer counts.
      extra_flops: FLOPs per training token in addition to those of the model.
      checkpoint: directory (or file) of the checkpoint that holds this model. None: unknown.
      prompt_length, n_new, rounds: see ``measure_latency``. Prompt and new tokens are shortened to fit into
        ``max_length``; the notes of the figures say what was measured.
    """
    figures = quality_figures(quality, split, note)
    if not all(block.mlp.independent_tokens for block in model.config.layers):
        figures = {name: _noted(figure, DROPS) for name, figure in figures.items()}
    figures |= _size(model, checkpoint) | _flops(model, length, training_tokens, steps, extra_flops)
    figures |= _training(training_figures or {}, training_tokens)
    n_new = min(n_new, max(1, model.config.max_length // 2))
    prompt_length = min(prompt_length, model.config.max_length - n_new)
    figures |= _latencies(model, prompt_length, n_new, rounds)
    figures |= {"peak_memory_bytes": _peak_memory()}
    later = "this version has no command that measures it"
    figures |= {
        "train_energy": not_measured("J", later),
        "decode_energy_per_token": not_measured("J/token", later),
        "train_cost": not_measured("USD", later),
        "decode_cost_per_token": not_measured("USD/token", later),
    }
    return Scorecard(name, figures, environment())


def path_bytes(path: Path) -> int:
    """Bytes of a file, or of all files under a directory together."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def quality_figures(values: Mapping[str, float] | None, split: str, note: str = "") -> dict[str, Figure]:
    """The quality figures of a scorecard, from the result of an ``Evaluator`` and the split of its rows."""
    units = {"bpb": "bits/byte", "loss": "nats/token"}
    if values is None:
        return {name: not_measured(unit, "no validation rows were given") for name, unit in units.items()}

    def figure(name: str, unit: str, *notes: str) -> Figure:
        return _finite(values[name], unit, "measured", "; ".join(filter(None, (*notes, note))), split)

    figures = {
        name: figure(name, unit) if name in values else not_measured(unit, LOOKS_AHEAD) for name, unit in units.items()
    }
    if "bpb_look_ahead" in values:
        how = "with the token choice of training, which looks ahead"
        figures["bpb_look_ahead"] = figure("bpb_look_ahead", "bits/byte", how)
    if "mean_depth" in values:
        figures["mean_depth"] = figure("mean_depth", "layers/token")
    return figures


def _noted(figure: Figure, note: str) -> Figure:
    """The figure with a further note, if it has a value."""
    return figure if figure.value is None else replace(figure, note="; ".join(filter(None, (figure.note, note))))


def _size(model: Decoder, checkpoint: Path | None) -> dict[str, Figure]:
    parameters = count_parameters(model)
    counts = {
        "parameters_total": (parameters.total, "a tied head counts once" if model.config.tied_embedding else ""),
        "parameters_active": (parameters.active, "used by one token"),
        "parameters_embedding": (parameters.embedding, ""),
    }
    sizes = {
        "parameter_bytes": (stored_bytes(model), "in memory"),
        "cache_bytes_per_token": (cache_bytes_per_token(model.config), "keys and values, all layers"),
    }
    return (
        {name: Figure(value, "parameters", "counted", note) for name, (value, note) in counts.items()}
        | {name: Figure(value, "B", "counted", note) for name, (value, note) in sizes.items()}
        | {"checkpoint_bytes": _checkpoint(checkpoint)}
        | _sparsity(model)
    )


def _sparsity(model: Decoder) -> dict[str, Figure]:
    zeros, size = pruned(model)
    if not zeros:
        return {}
    whole = zeros / count_parameters(model).total
    note = f"zeros in matrices of blocks, {whole:.1%} of all parameters; fewer bytes on disk, no speed"
    return {"sparsity": Figure(zeros / size, "share", "counted", note)}


def _checkpoint(path: Path | None) -> Figure:
    if path is None or not path.exists():
        return not_measured("B", "no checkpoint was given" if path is None else f"there is no {path}")
    return Figure(path_bytes(path), "B", "measured", "on disk; with optimizer state where it was trained")


def _flops(
    model: Decoder, length: int, training_tokens: int | None, steps: int | None, extra: float
) -> dict[str, Figure]:
    per_token = training_flops(model, length, steps=steps) + extra
    convention = f"rows of {length}, forward and backward, causal attention halved"
    if extra:
        convention += f"; {extra / per_token:.0%} of it in the objective, outside the model"
    return {
        "train_flops_per_token": Figure(per_token, "FLOP/token", "counted", convention),
        "decode_flops_per_token": Figure(
            decode_flops(model, length), "FLOP/token", "counted", f"after a context of {length}"
        ),
        "train_flops": not_measured("FLOP", "the number of training tokens was not given")
        if training_tokens is None
        else Figure(per_token * training_tokens, "FLOP", "counted", convention),
    }


def _training(given: Mapping[str, float], training_tokens: int | None) -> dict[str, Figure]:
    missing = "too few steps to time" if given else "no figures of a training run were given"
    wanted = {
        "train_tokens_per_s": ("tokens_per_s", "tokens/s", "at the median step"),
        "step_s_p50": ("step_s_p50", "s", ""),
        "step_s_p95": ("step_s_p95", "s", ""),
        "input_wait_share": ("input_wait_share", "share", "of the step time"),
        "mfu": ("mfu", "share", "model FLOPs of the dense bf16 peak"),
        "checkpoint_share": ("checkpoint_share", "share", "of the loop's wall time, spent waiting for checkpoints"),
        "evaluation_share": ("evaluation_share", "share", "of the loop's wall time"),
        "compile_s": ("compile_s", "s", _compiled(given)),
    }
    reasons = {"mfu": _why_no_mfu()} if "step_s_p50" in given else {}
    tokens = (
        not_measured("tokens", "the number of training tokens was not given")
        if training_tokens is None
        else Figure(training_tokens, "tokens", "counted", "padding included")
    )
    return {"train_tokens": tokens} | {
        name: _finite(given[key], unit, "measured", note)
        if key in given
        else not_measured(unit, reasons.get(name, missing))
        for name, (key, unit, note) in wanted.items()
    }


def _compiled(given: Mapping[str, float]) -> str:
    return "training step" + (", loaded from the compilation cache" if given.get("compile_cached") else "")


def _why_no_mfu() -> str:
    kind = jax.devices()[0].device_kind
    return "fit was not given flops_per_token" if find_chip(kind) else f"the peak FLOP/s of this {kind} is not known"


def _latencies(model: Decoder, prompt_length: int, n_new: int, rounds: int) -> dict[str, Figure]:
    prefill_figures, decode_figures = {}, {}
    why = None
    if (n := hosts.process_count()) > 1:
        why = f"the model is spread over {n} processes; load the run in one and measure it there"
    if not routes_causally(model):
        why = LOOKS_AHEAD
    if why:
        return {
            f"{name}_b{batch}": not_measured(unit, why)
            for name, unit in (("prefill_s", "s"), ("decode_s_per_token", "s/token"))
            for batch in LATENCY_BATCHES
        }
    with Progress("latency", len(LATENCY_BATCHES), unit="batch sizes") as progress:
        for batch in LATENCY_BATCHES:
            progress.note(f"batch {batch}")
            prefill, decode = measure_latency(
                model, batch=batch, prompt_length=prompt_length, n_new=n_new, rounds=rounds
            )
            read, decoded = f"{prompt_length} tokens", f"{n_new} tokens after {prompt_length}"
            prefill_figures[f"prefill_s_b{batch}"] = _latency(prefill, prefill.median_s, "s", read)
            decode_figures[f"decode_s_per_token_b{batch}"] = _latency(decode, decode.s_per_token, "s/token", decoded)
            progress.advance()
    return prefill_figures | decode_figures


def _latency(found: Latency, value: float, unit: str, what: str) -> Figure:
    spread = found.spread_s / found.median_s
    note = f"{what}, {found.tokens_per_s:,.0f} tokens/s; median of {len(found.rounds_s)}, spread {spread:.0%}"
    return Figure(value, unit, "measured", f"{note}; compiled in {found.compile_s:.1f} s")


def _peak_memory() -> Figure:
    on_device = device_peak_bytes()
    if on_device is not None:
        return Figure(on_device, "B", "measured", "fullest device, since the process started")
    if jax.default_backend() != "cpu":
        return not_measured("B", f"{jax.devices()[0].device_kind} does not report it")
    resident = host_peak_bytes()
    if resident is None:
        return not_measured("B", "this system does not report it")
    return Figure(resident, "B", "measured", "resident, whole process since its start")


def _finite(value: float, unit: str, method: Method, note: str, split: str = "") -> Figure:
    if not math.isfinite(value):
        return Figure(None, unit, "unavailable", f"the computed value is {value}", split)
    return Figure(float(value), unit, method, note, split)
