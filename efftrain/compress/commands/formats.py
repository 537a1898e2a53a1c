"""Number formats on the command line, and the quantisation rules that they stand for."""

from dataclasses import replace

from efftrain.errors import ConfigError
from efftrain.models.config import ModelConfig
from efftrain.models.quantization import QuantizationRule
from efftrain.ops.number_formats import AnyFormat, parse_format
from efftrain.progress import console

ALL_BLOCKS = "blocks/.*"


def parse(text: str | None) -> AnyFormat | None:
    """Parses the name of a number format; None if there is no name."""
    return parse_format(text) if text else None


def rules_of(
    config: ModelConfig, *, weights: str | None, activations: str | None, layers: str
) -> tuple[QuantizationRule, ...]:
    """The quantisation rules for the formats on the command line; without a format, those the run was trained for.

    Args:
      config: configuration of the model that is quantised.
      weights: name of the number format of the matrices. None: as the run was trained.
      activations: name of the number format of the inputs of the matrices. None: float.
      layers: a regular expression for the names of the matrices; see ``QuantizationRule``.

    Raises:
      ConfigError: ``layers`` is given for a run whose rules have layers of their own.
    """
    stored, inputs = parse(weights), parse(activations)
    trained = config.quantization.rules
    if stored is None and inputs is None:
        return trained
    if stored is None and trained:
        if layers != ALL_BLOCKS:
            raise ConfigError("the run was trained with its own quantization rules; remove --layers")
        return tuple(replace(rule, activations=inputs) for rule in trained)
    rule = QuantizationRule(layers=layers, weights=stored, activations=inputs)
    if any(r.learned_step for r in trained):
        if (same := replace(rule, learned_step=True)) in trained:
            return (same,)
        console.print(
            "warning: the run learned its step sizes for other rules, and new scales are computed; leave --weights "
            "out to keep the learned ones",
            style="yellow",
        )
    return (rule,)
