"""Whether and as what a model can be exported: decided from its configuration alone, so before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from efftrain.config import difference, to_json
from efftrain.errors import ConfigError
from efftrain.interop.architecture import Architecture, layout, same_model
from efftrain.interop.architectures import ARCHITECTURES
from efftrain.interop.compressed_tensors import CompressedTensors, compressed_tensors
from efftrain.interop.run_arrays import float_config
from efftrain.interop.settings import Settings
from efftrain.interop.widths import of_one_width, share_of_zeros
from efftrain.interop.writing import settings_of
from efftrain.models.config import ModelConfig

# In the order of preference: the plainest architecture that expresses a model is read by most programs.
PREFERENCE = ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe", "qwen2")
# Whose configuration class in transformers refuses a width that is no multiple of the number of heads.
HEADS_DIVIDE_WIDTH = ("llama", "gemma2", "gemma3_text")
KEEP = "keep the run directory, which efftrain.load opens"
PROGRAM = "export a program for JAX alone (--format stablehlo)"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """How a model is exported.

    Attributes:
      architecture: the foreign architecture that computes the same.
      settings: the fields of its ``config.json``.
      config: configuration of what is exported: of the model without its quantisation, its layers of one width.
      quantized: the quantised files; None: all numbers are float.
      notes: what the export does not carry over, such as the speed of pruned weights, as sentences.
    """

    architecture: Architecture
    settings: dict[str, Any]
    config: ModelConfig
    quantized: CompressedTensors | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a model cannot be exported.

    Attributes:
      reason: the field of the configuration and what is wrong with it, as a sentence.
      alternatives: what could be done instead, as sentences.
    """

    reason: str
    alternatives: tuple[str, ...]


def classify(
    config: ModelConfig, *, preference: Sequence[str] = PREFERENCE, compressed: bool = False
) -> ExportPlan | Refusal:
    """Finds the architecture that computes what a model computes.

    An architecture fits if the settings that describe the model, read back, give the same configuration.

    Args:
      config: configuration of the model, which need not be trained yet.
      preference: ``model_type`` of the architectures that are tried first.
      compressed: quantised matrices are to stay quantised, as ``compressed-tensors``. False: they are written in float.
    """
    for number, block in enumerate(config.layers):
        if not block.depth.every_token:
            return Refusal(
                reason=f"layer {number} has depth {type(block.depth).__name__}, by which tokens skip or repeat layers, "
                "and no other project has an architecture for it",
                alternatives=("train with depth Full, or with early exits, which are exported", KEEP),
            )
    try:
        exported = of_one_width(float_config(config))
        fields = settings_of(exported)
    except ConfigError as error:
        return Refusal(reason=str(error), alternatives=(PROGRAM, KEEP))
    reasons: list[tuple[int, str]] = []
    for model_type in (*preference, *(name for name in ARCHITECTURES if name not in preference)):
        architecture = ARCHITECTURES[model_type]
        settings = Settings(fields, architecture.name)
        try:
            back = architecture.to_config(settings)
            different = difference(_by_layer(back), _by_layer(exported))
            if different:
                reasons.append((len(different), f"{architecture.name} differs in {different[0]}"))
                continue
            heads = fields["num_attention_heads"]
            if model_type in HEADS_DIVIDE_WIDTH and exported.d_model % heads:
                reasons.append((0, f"{architecture.name} needs a d_model that is a multiple of {heads} heads"))
                continue
            layout(architecture, exported)
        except ConfigError as error:
            reasons.append((1000, f"{architecture.name}: {error}"))
            continue
        written = {name: value for name, value in fields.items() if name in settings.read}
        plan = ExportPlan(architecture=architecture, settings=written, config=exported, notes=_notes(config, exported))
        return _compressed(plan, config) if compressed else replace(plan, notes=plan.notes + _float_notes(config))
    return Refusal(
        reason=f"no other project's architecture computes this model; the nearest: {min(reasons)[1]}",
        alternatives=("change that field before training", PROGRAM, KEEP),
    )


def _by_layer(config: ModelConfig) -> dict[str, Any]:
    """The configuration with a list of its layers instead of their pattern, so that a difference has a short path."""
    same = same_model(config)
    value = {name: entry for name, entry in to_json(same).items() if name not in ("pattern", "n_repeats")}
    return value | {"layers": to_json(same.layers)}


def _compressed(plan: ExportPlan, config: ModelConfig) -> ExportPlan | Refusal:
    try:
        quantized = compressed_tensors(plan.architecture, plan.config, config.quantization)
    except ConfigError as error:
        same = "give --format float32, which writes the same values in float"
        return Refusal(reason=str(error), alternatives=(same, KEEP))
    settings = plan.settings | {"quantization_config": quantized.settings}
    return replace(plan, settings=settings, quantized=quantized, notes=plan.notes + quantized.notes)


def _notes(config: ModelConfig, exported: ModelConfig) -> tuple[str, ...]:
    notes = []
    if config.layer_dropout.rate:
        notes.append("Layers that training skipped at random are all computed.")
    if any(getattr(block.mlp, "dispatch", None) == "capacity" for block in config.layers):
        notes.append("Experts take every token that is routed to them, also those that moe.dispatch 'capacity' drops.")
    if exported != (plain := float_config(config)):
        notes.append(
            "Layers of different widths are filled up with zeros to the widest one: the results are the same, and "
            f"{share_of_zeros(plain, exported):.0%} of the exported numbers are such zeros, which cost memory and time."
        )
    if config.quantization.cache is not None:
        notes.append("Keys and values in the cache are not quantised.")
    return tuple(notes)


def _float_notes(config: ModelConfig) -> tuple[str, ...]:
    notes, rules = [], config.quantization.rules
    if any(rule.weights is not None for rule in rules):
        notes.append(
            "Quantised matrices have the values that they are quantised to, in float; --format compressed-tensors "
            "keeps a converted run quantised."
        )
    if any(rule.activations is not None for rule in rules):
        notes.append("The inputs of the matrices are not quantised.")
    return tuple(notes)
