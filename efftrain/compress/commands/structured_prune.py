"""``efftrain compress structured``: structured pruning to a smaller, faster model."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from efftrain.compress.commands.recovery_training import RecoveryTraining
from efftrain.compress.commands.run_name import suffix
from efftrain.compress.corpus_rows import CorpusRows, check_rows
from efftrain.compress.layerwise.layerwise_model import LayerwiseModel
from efftrain.compress.structured.cut import structured_prune
from efftrain.compress.structured.importance import importance
from efftrain.compress.structured.shape import Shape
from efftrain.compress.structured.shape_count import CountedMetric
from efftrain.compress.structured.shape_latency import fast_shapes
from efftrain.compress.structured.shapes import Axis, candidates
from efftrain.errors import ConfigError
from efftrain.measure.measurements import Measurements
from efftrain.models.config import ModelConfig
from efftrain.models.decoder import Decoder
from efftrain.train.run.directory import load_model_config

Metric = Literal[CountedMetric, "latency"]


@dataclass(frozen=True, kw_only=True)
class StructuredPrune:
    """Removes the least important units, heads, channels, experts or layers of a run's model.

    Attributes:
      ratio: the share of ``metric`` that is removed (the pruning ratio).
      axis: what is pruned: "width", "depth" or, with ``search``, "any", which tries both.
      metric: what ``ratio`` is a share of: parameters, model FLOPs of training, or seconds to decode a token.
      search: number of shapes that are tried, each with a tenth of the tokens of ``recovery``. None: the first
        candidate is taken.
      shape: shape of the smaller model. None: the first candidate for ``ratio``, ``axis`` and ``metric``.
      rows: number of rows of the training split for calibration, and of the validation split for each trial of a
        search and for bits per byte before and after.
      recovery: training after pruning. None: there is none.
    """

    ratio: float
    axis: Axis = "width"
    metric: Metric = "parameters"
    search: int | None = None
    shape: Shape | None = None
    rows: int = 128
    recovery: RecoveryTraining | None = None

    def __post_init__(self):
        check_rows(self.rows)
        if not 0 < self.ratio < 1:
            raise ConfigError(f"--ratio is {self.ratio}; give the share to remove, between 0 and 1")
        for name, value, values in (("axis", self.axis, get_args(Axis)), ("metric", self.metric, get_args(Metric))):
            if value not in values:
                raise ConfigError(f"--{name} is {value}; use one of {', '.join(values)}")
        if self.search is None and self.axis == "any":
            raise ConfigError("--axis any needs a search over shapes; add --search 4 and --recovery-tokens")
        if self.search is not None and self.search < 2:
            raise ConfigError(f"--search is {self.search}; give 2 shapes or more")
        if self.search is not None and self.recovery is None:
            raise ConfigError("--search trains each shape; add --recovery-tokens with a number of tokens")

    @property
    def chosen_on(self) -> int:
        """Number of rows, from the start of the validation split, on which a shape is chosen."""
        return 0 if self.search is None else self.rows

    @property
    def name(self) -> str:
        """The suffix that the default name of the new run adds to the name of the old one."""
        words = [f"structured{self.ratio}", "" if self.axis == "width" else self.axis]
        words += ["" if self.metric == "parameters" else self.metric, f"search{self.search}" if self.search else ""]
        return suffix(*words, None if self.recovery is None else self.recovery.name)

    def in_round(self, number: int) -> "StructuredPrune":
        """The pruning of one round of recovery, from 1: every round removes the same share of what is left."""
        axis = "width" if self.search is not None else self.axis  # with a search, the shape decides
        rounds = 1 if self.recovery is None else self.recovery.rounds
        ratio = self.ratio if rounds == 1 else 1 - (1 - self.ratio) ** (1 / rounds)
        return replace(self, ratio=ratio, axis=axis, search=None, recovery=None)

    def shapes(self, config: ModelConfig, axis: Axis, length: int) -> list[Shape]:
        """The candidates for the shape of the smaller model, the best guess first.

        Args:
          config: configuration of the whole model.
          axis: what is pruned.
          length: tokens of a row, for FLOPs.
        """
        if self.metric == "latency":
            return fast_shapes(config, 1 - self.ratio, axis=axis, length=length)
        return candidates(config, 1 - self.ratio, axis=axis, metric=self.metric, length=length)

    def apply(self, run: Path, text: CorpusRows, kept: Measurements) -> tuple[Decoder, dict[str, Any]]:
        """Prunes the model of a run to a smaller shape.

        Args:
          run: the run directory.
          text: the corpus for calibration and evaluation.
          kept: not used.

        Returns:
          The model and the report as JSON.

        Raises:
          ConfigError: no shape has that ratio, or the model cannot be pruned.
        """
        shape = self.shape or self.shapes(load_model_config(run), self.axis, text.length)[0]
        pieces = LayerwiseModel.read(run)
        model, report = structured_prune(pieces, shape, importance(pieces, text.calibration(self.rows)))
        return model, {"structured": report.as_json()} | text.before_and_after(run, model, self.rows)
