"""The options of recovery training (healing), which prune and structured share."""

from dataclasses import dataclass

from efftrain.compress.commands.run_name import suffix
from efftrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RecoveryTraining:
    """Training after pruning, which recovers the quality that the pruning cost; also called healing.

    Attributes:
      tokens: number of tokens of training, over all rounds.
      rounds: number of rounds of pruning and training; the tokens are divided between them.
      distill: whether the model distils from the original run instead of training on the text.
    """

    tokens: int
    rounds: int = 1
    distill: bool = False

    def __post_init__(self):
        if self.tokens < 1:
            raise ConfigError(f"--recovery-tokens is {self.tokens}; give at least 1, or remove the flag")
        if self.rounds < 1:
            raise ConfigError(f"--rounds is {self.rounds}; give at least 1")

    @property
    def name(self) -> str:
        """The part of a run's default name that says how it was trained after pruning, such as r400000-2rounds."""
        rounds = f"{self.rounds}rounds" if self.rounds > 1 else ""
        return suffix(f"r{self.tokens}", rounds, "distilled" if self.distill else "")
