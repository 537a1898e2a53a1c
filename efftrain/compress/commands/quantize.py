"""``efftrain compress quantize``: post-training quantisation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import efftrain
from efftrain.compress.commands.formats import ALL_BLOCKS, parse, rules_of
from efftrain.compress.commands.run_name import suffix
from efftrain.compress.corpus_rows import CorpusRows, check_rows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.quantization.convert import Method, convert
from efftrain.compress.quantization.mixed_precision import ChosenFormats, choose_formats
from efftrain.errors import ConfigError
from efftrain.measure.measurements import Measurements
from efftrain.measure.quality.held_out import CHOICES
from efftrain.models.decoder import Decoder
from efftrain.models.quantization import Quantization, QuantizationRule
from efftrain.models.zeros import zeros_share
from efftrain.ops.number_formats import parse_format
from efftrain.train.run.directory import load_model_config


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Quantises the weights of a run's model, and on request its activations and its KV cache.

    Attributes:
      weights: number format of the weight matrices, such as int8 or int4:g32. With ``budget``, two or more formats
        separated by commas. None: the formats that the run was trained for.
      activations: number format of the inputs of the matrices. None: they stay float.
      cache: number format of the KV cache. None: that of the run, or float.
      layers: a regular expression for the names of the matrices; see ``models.quantization.QuantizationRule``.
      method: see ``compress.quantization.convert.convert``.
      budget: the most bytes that the matrices of the blocks may take, as a share of their bytes in float32; each part
        of each layer gets the format that fits (mixed precision).
      rows: number of rows of the training split that "gptq" and "awq" read, and of the validation split for each trial
        of a budget.
    """

    weights: str | None = None
    activations: str | None = None
    cache: str | None = None
    layers: str = ALL_BLOCKS
    method: Method = "rtn"
    budget: float | None = None
    rows: int = 128

    def __post_init__(self):
        check_rows(self.rows)
        if self.method not in get_args(Method):
            raise ConfigError(f"--method is {self.method}; use one of {', '.join(get_args(Method))}")
        several = "," in (self.weights or "")
        if self.budget is not None:
            if not 0 < self.budget < 1:
                raise ConfigError(f"--budget is {self.budget}; give a share between 0 and 1")
            if not several:
                raise ConfigError("--budget chooses between formats; give several, such as --weights int8,int4:g32")
            if self.activations or self.layers != ALL_BLOCKS:
                raise ConfigError("--budget is for the weights of all blocks; remove --activations and --layers")
        elif several:
            raise ConfigError(f"--weights is {self.weights}; give one format, or a --budget to choose by")
        if self.layers != ALL_BLOCKS and not (self.weights or self.activations):
            raise ConfigError("--layers is given without a number format; add --weights or --activations")
        for text in (self.weights or "").split(","):
            QuantizationRule(weights=parse(text), activations=parse(self.activations))
        Quantization(cache=parse(self.cache))

    @property
    def chosen_on(self) -> int:
        """Number of rows, from the start of the validation split, on which formats are chosen."""
        return 0 if self.budget is None else self.rows

    @property
    def name(self) -> str:
        """The suffix that the default name of the new run adds to the name of the old one."""
        words = [self.weights, self.activations and f"a-{self.activations}", self.cache and f"kv-{self.cache}"]
        words += ["" if self.method == "rtn" else self.method, f"{self.budget}x" if self.budget else ""]
        return suffix(*words) or "stored"

    def apply(self, run: Path, text: CorpusRows, kept: Measurements) -> tuple[Decoder, dict[str, Any]]:
        """Quantises the model of a run.

        Args:
          run: the run directory.
          text: the corpus for calibration and for the trials of a budget.
          kept: trials of an earlier command that was interrupted; new ones are added.

        Returns:
          The model and the report as JSON. A run without formats and with zeros is only stored without its zeros.

        Raises:
          ConfigError: there is nothing to do, or the formats do not fit the model.
        """
        config = load_model_config(run)
        calibration = text.calibration(self.rows) if self.method != "rtn" else None
        chosen = None if self.budget is None else self._choose(efftrain.load(run), self.budget, text, kept)
        if chosen is not None:
            rules = chosen.rules
        else:
            rules = rules_of(config, weights=self.weights, activations=self.activations, layers=self.layers)
        quantization = Quantization(rules=rules, cache=parse(self.cache) or config.quantization.cache)
        if quantization == Quantization():
            model = efftrain.load(run)
            if not zeros_share(model):
                raise ConfigError(
                    f"{run} was not trained for quantisation and has no zeros; give a number format, such as "
                    "--weights int8"
                )
            return model, {"bytes_share": None, "matrices": []}
        pieces, unrolled = LayerwiseModel.read(run), chosen is not None
        model, report = convert(pieces, quantization, method=self.method, calibration=calibration, unrolled=unrolled)
        choice = {} if chosen is None else {"choice": chosen.as_json() | {"split": CHOICES, "rows": self.rows}}
        return model, report.as_json() | choice

    def _choose(self, model: Decoder, budget: float, text: CorpusRows, kept: Measurements) -> ChosenFormats:
        formats = [parse_format(part) for part in (self.weights or "").split(",")]
        evaluate = text.choosing(self.rows).evaluator()
        return choose_formats(model, formats, budget, lambda model: evaluate(model)["bpb"], kept)
