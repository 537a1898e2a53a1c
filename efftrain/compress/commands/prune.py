"""``efftrain compress prune``: single weights, or n of m, become zero."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from efftrain.compress.commands.formats import ALL_BLOCKS, parse, rules_of
from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.run_name import suffix
from efftrain.compress.corpus_rows import CorpusRows, check_rows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.pruning.one_shot import PruneMethod, prune
from efftrain.errors import ConfigError
from efftrain.measure.measurements import Measurements
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.ops.masks import SemiStructured, Structure, Unstructured
from efftrain.train.run.directory import load_model_config


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prunes weights of a run's model; with SparseGPT, it can quantise the remaining ones in the same pass.

    JAX has no sparse products, so that the new model takes fewer bytes on disk and is not faster.

    Attributes:
      sparsity: the share of the weights that becomes zero, such as 0.5, or a pattern n:m, such as 2:4.
      method: see ``compress.pruning.one_shot.prune``.
      weights: number format of the remaining weights. None: they stay float.
      activations: number format of the inputs of the matrices. None: they stay float.
      layers: a regular expression for the names of the matrices; see ``models.quantization.QuantizationRule``.
      rows: number of rows of the training split for calibration, and of the validation split on which bits per byte
        before and after are reported.
      recovery: training after pruning. None: there is none.
    """

    sparsity: str
    method: PruneMethod = "sparsegpt"
    weights: str | None = None
    activations: str | None = None
    layers: str = ALL_BLOCKS
    rows: int = 128
    recovery: RecoveryTraining | None = None

    def __post_init__(self):
        check_rows(self.rows)
        structure, quantized = self.structure, bool(self.weights or self.activations)
        if self.method not in get_args(PruneMethod):
            raise ConfigError(f"--method is {self.method}; use one of {', '.join(get_args(PruneMethod))}")
        if quantized and self.method != "sparsegpt":
            raise ConfigError(
                f"--weights and --activations need --method sparsegpt, but --method is {self.method}; remove both "
                "and quantise the pruned run"
            )
        if quantized and self.recovery is not None:
            raise ConfigError(
                "--recovery-tokens trains float weights; remove --weights and --activations, or train for them with "
                "recipes/qat.py"
            )
        if self.recovery is not None and self.recovery.rounds > 1 and isinstance(structure, SemiStructured):
            raise ConfigError(f"--sparsity {self.sparsity} is reached in one round; remove --rounds")
        QuantizationRule(weights=parse(self.weights), activations=parse(self.activations))

    @property
    def structure(self) -> Structure:
        """The pattern of zeros that ``sparsity`` describes.

        Raises:
          ConfigError: ``sparsity`` is neither a share nor n:m.
        """
        n, colon, m = self.sparsity.partition(":")
        try:
            return SemiStructured(n=int(n), m=int(m)) if colon else Unstructured(sparsity=float(n))
        except ValueError as error:
            raise ConfigError(f"--sparsity is {self.sparsity!r}; give a share such as 0.5, or 2:4") from error

    @property
    def chosen_on(self) -> int:
        """0: nothing is chosen on validation rows."""
        return 0

    @property
    def name(self) -> str:
        """The suffix that the default name of the new run adds to the name of the old one."""
        words = [f"sparse{self.sparsity.replace(':', 'of')}", "" if self.method == "sparsegpt" else self.method]
        words += [self.weights or "", f"a-{self.activations}" if self.activations else ""]
        return suffix(*words, None if self.recovery is None else self.recovery.name)

    def in_round(self, number: int) -> "Prune":
        """The pruning of one round of recovery, from 1: every round prunes the same share of the remaining weights."""
        once = replace(self, recovery=None)
        if self.recovery is None or self.recovery.rounds == 1:
            return once
        sparsity = Unstructured(sparsity=float(self.sparsity)).sparsity
        # The sparsity of a round includes the zeros of the rounds before it.
        return replace(once, sparsity=str(1 - (1 - sparsity) ** (number / self.recovery.rounds)))

    def apply(self, run: Path, text: CorpusRows, kept: Measurements) -> tuple[Decoder, dict[str, Any]]:
        """Prunes the model of a run.

        Args:
          run: the run directory.
          text: the corpus for calibration and evaluation.
          kept: not used.

        Returns:
          The model and the report as JSON.

        Raises:
          ConfigError: the sparsity or the formats do not fit the model.
        """
        quantization = None
        if self.weights or self.activations:
            config = load_model_config(run)
            rules = rules_of(config, weights=self.weights, activations=self.activations, layers=self.layers)
            quantization = Quantization(rules=rules, cache=config.quantization.cache)
        model, report = prune(
            LayerwiseModel.read(run),
            self.structure,
            method=self.method,
            calibration=None if self.method == "magnitude" else text.calibration(self.rows),
            quantization=quantization,
            layers=self.layers,
        )
        return model, report.as_json() | text.before_and_after(run, model, self.rows)
