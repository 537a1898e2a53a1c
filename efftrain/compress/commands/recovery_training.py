"""The options of recovery training (healing), which prune and structured share."""

from dataclasses import dataclass, field

from efftrain.compress.commands.run_name import suffix
from efftrain.config import LATER
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecoveryTraining:
    """Training after pruning, which recovers the quality that the pruning cost; also called healing.

    Attributes:
      tokens: number of tokens of training, over all rounds.
      rounds: number of rounds of pruning and training; the tokens are divided between them.
      distill: whether the model distils from the original run instead of training on the text.
      learning_rate: peak learning rate. None: a share of that of the original run, see ``recover``.
      batch_size: rows per step. None: as in the original run.
    """

    tokens: int
    rounds: int = 1
    distill: bool = False
    learning_rate: float | None = field(default=None, metadata=LATER)
    batch_size: int | None = field(default=None, metadata=LATER)

    def __post_init__(self):
        if self.tokens < 1:
            raise ConfigError(f"--recovery-tokens is {self.tokens}; give at least 1, or remove the flag")
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}; give at least 1")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"--learning-rate is {self.learning_rate}; give a positive number, such as 1e-5")
        if self.batch_size is not None and self.batch_size < 1:
            raise ConfigError(f"--batch-size is {self.batch_size}; give at least 1")

    @property
    def name(self) -> str:
        """The part of a run's default name that says how it was trained after pruning, such as r400000-2rounds."""
        rounds = f"{self.rounds}rounds" if self.rounds > 1 else ""
        rate = f"lr{self.learning_rate:g}" if self.learning_rate else ""
        batch = f"batch{self.batch_size}" if self.batch_size else ""
        return suffix(f"r{self.tokens}", rounds, "distilled" if self.distill else "", rate, batch)
