"""Risk control: the lowest confidence threshold for which a mean loss stays under a bound with a given probability.

The tests hold for independent losses: those of documents (``row_documents``), but not those of rows or tokens, because
the rows and tokens of a document resemble each other.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np


def documents_needed(bound: float, error: float) -> int:
    """Number of documents without any loss that are needed to show that the mean loss is under ``bound``.

    Args:
      bound: bound of the mean loss.
      error: the probability that the conclusion is wrong.
    """
    return next(n for n in itertools.count(1) if p_value([0.0] * n, bound) <= error)


def p_value(losses: Sequence[float], bound: float) -> float:
    """Hoeffding-Bentkus p-value of the hypothesis that the mean of independent losses is above ``bound``.

    Args:
      losses: independent losses between 0 and 1.
      bound: bound of the mean.

    Source: Bates et al. 2021 (Distribution-free, risk-controlling prediction sets), section 3.1.
    """
    from scipy.stats import binom

    n, mean = len(losses), float(np.mean(losses))

    def relative_entropy(a: float, b: float) -> float:
        return (a * math.log(a / b) if a else 0.0) + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)

    hoeffding = math.exp(-n * relative_entropy(min(mean, bound), bound))
    bentkus = math.e * binom.cdf(math.ceil(n * mean - 1e-9), n, bound)
    return float(min(hoeffding, bentkus, 1.0))


def last_safe(losses: Sequence[Sequence[float]], bound: float, error: float) -> int | None:
    """Fixed-sequence test: the boldest setting, in an order from safe to bold, whose mean loss is under a bound.

    The order must be fixed before any setting is measured. The settings are tested in this order until one fails, so
    that the probability of a wrong result is at most ``error`` for any number of settings.

    Args:
      losses: for each setting, the losses of the same independent samples (documents), between 0 and 1.
      bound: bound of the mean loss.
      error: the probability that the result is wrong.

    Returns:
      The index of the setting, or None if even the first one fails.

    Source: Angelopoulos et al. 2021 (Learn then Test), fixed-sequence testing; applied to early exits by Schuster et
      al.
    2022 (CALM).
    """
    safe = None
    for i, of_setting in enumerate(losses):
        if p_value(of_setting, bound) > error:
            break
        safe = i
    return safe
