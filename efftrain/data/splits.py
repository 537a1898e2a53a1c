"""Assigns documents to train, validation and test by group, so that no relative of a test document is trained on."""

from dataclasses import dataclass

import numpy as np

from efftrain.errors import ConfigError, CorpusError
from efftrain.moved import old_names

__getattr__ = old_names(__name__)  # of ``SplitByGroup``

SPLITS = ("train", "validation", "test")
N_BUCKETS = 1 << 16  # groups are hashed into buckets, so that memory does not grow with the number of groups


@dataclass(frozen=True, kw_only=True)
class SplitByGroup:
    """Assigns whole groups to validation and test, until each has its share of the bytes.

    Groups are taken in the order of a hash of their names. A group that would fill more than a quarter of a
    held-out split stays in train as long as smaller ones are available: if one group dominated the split, bits per
    byte would describe that group.

    Attributes:
      validation: share of the bytes in the validation split, between 0 and 1; 0 omits the split.
      test: share of the bytes in the test split, between 0 and 1; 0 omits the split.
      seed: seed of the hash; another seed selects other groups.
    """

    validation: float = 0.05
    test: float = 0.05
    seed: int = 0

    def __post_init__(self):
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ConfigError(
                f"split.validation {self.validation} and split.test {self.test} must not be negative, and their "
                "sum must be below 1"
            )

    @property
    def n_splits(self) -> int:
        """Number of splits, including train."""
        return 1 + (self.validation > 0) + (self.test > 0)


def bucket(groups: np.ndarray) -> np.ndarray:
    """Returns the bucket of each 64-bit group hash: its upper 16 bits, as int64."""
    return (groups >> np.uint64(48)).astype(np.int64)


def assign_buckets(config: SplitByGroup, sizes: np.ndarray) -> np.ndarray:
    """Chooses the split of each bucket.

    Args:
      config: the shares of the splits.
      sizes: (N_BUCKETS,) number of bytes of the kept documents in each bucket.

    Returns:
      (N_BUCKETS,) indices into SPLITS, int8.

    Raises:
      CorpusError: fewer buckets have a document than there are splits.
    """
    free = np.flatnonzero(sizes).tolist()
    shares = {"validation": config.validation, "test": config.test}
    n_wanted = config.n_splits
    if len(free) < n_wanted:
        documents = "document is" if len(free) == 1 else "documents are"
        raise CorpusError(
            f"only {len(free)} {documents} left for {n_wanted} splits; add documents, cut a large text into several "
            "(split=data.AtBlankLines() of TextFolder), or set split.validation or split.test to 0"
        )
    result = np.zeros(len(sizes), np.int8)
    for split, share in shares.items():
        # One bucket must remain for each later split, and one for train.
        n_wanted -= share > 0
        taken = _take(free, sizes, share * sizes.sum(), max_buckets=len(free) - n_wanted) if share else []
        result[taken] = SPLITS.index(split)
        free = [number for number in free if not result[number]]
    return result


def _take(free: list[int], sizes: np.ndarray, budget: float, max_buckets: int) -> list[int]:
    taken: dict[int, None] = {}
    left = budget
    for largest in (budget / 4, budget):
        for number in free:
            full = left < budget / 10 or len(taken) == max_buckets
            if not full and number not in taken and sizes[number] <= min(largest, left):
                taken[number] = None
                left -= sizes[number]
    return list(taken) or [min(free, key=lambda number: sizes[number])]
