"""Whether and as what a model can be exported: decided from its configuration alone, so before it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from efftrain.config import difference, to_json
from efftrain.errors import ConfigError
from efftrain.interop.architecture import Architecture, layout, same_model
from efftrain.interop.architectures import ARCHITECTURES
from efftrain.interop.settings import Settings
from efftrain.interop.writing import settings_of
from efftrain.models.config import ModelConfig

# In the order of preference: the plainest architecture that expresses a model is read by most programs.
PREFERENCE = ("llama", "mistral", "qwen3", "mixtral", "qwen3_moe", "qwen2")


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """How a model is exported.

    Attributes:
      architecture: the foreign architecture that computes the same.
      settings: the fields of its ``config.json``.
      notes: what the export does not carry over, such as the speed of pruned weights, as sentences.
    """

    architecture: Architecture
    settings: dict[str, Any]
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


def classify(config: ModelConfig, *, preference: Sequence[str] = PREFERENCE) -> ExportPlan | Refusal:
    """Finds the architecture that computes what a model computes.

    An architecture fits if the settings that describe the model, read back, give the same configuration.

    Args:
      config: configuration of the model, which need not be trained yet.
      preference: ``model_type`` of the architectures that are tried first.
    """
    try:
        fields = settings_of(config)
    except ConfigError as error:
        return Refusal(reason=str(error), alternatives=("keep the run directory, which efftrain.load opens",))
    reasons: list[tuple[int, str]] = []
    for model_type in (*preference, *(name for name in ARCHITECTURES if name not in preference)):
        architecture = ARCHITECTURES[model_type]
        settings = Settings(fields, architecture.name)
        try:
            back = architecture.to_config(settings)
            different = difference(to_json(same_model(back)), to_json(same_model(config)))
            if not different:
                layout(architecture, config)
                written = {name: value for name, value in fields.items() if name in settings.read}
                return ExportPlan(architecture=architecture, settings=written, notes=_notes(config))
            reasons.append((len(different), f"{architecture.name} differs in {different[0]}"))
        except ConfigError as error:
            reasons.append((1000, f"{architecture.name}: {error}"))
    return Refusal(
        reason=f"no other project's architecture computes this model; the nearest: {min(reasons)[1]}",
        alternatives=("change that field before training", "keep the run directory, which efftrain.load opens"),
    )


def _notes(config: ModelConfig) -> tuple[str, ...]:
    notes = []
    if config.layer_dropout.rate:
        notes.append("Layers that training skipped at random are all computed.")
    if any(getattr(block.mlp, "dispatch", None) == "capacity" for block in config.layers):
        notes.append("Experts take every token that is routed to them, also those that moe.dispatch 'capacity' drops.")
    if config.quantization.rules and not config.quantization.stored:
        notes.append("The matrices have the values that they are quantised to, in float.")
    return tuple(notes)
