"""How low a threshold may go, with a stated probability that a mean stays under its bound.

The bounds are for independent losses: those of documents (``row_documents``), and not of rows or tokens, of which a
document has several that are alike.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np


def documents_needed(bound: float, error: float) -> int:
    """How many documents without any loss show that the mean is under ``bound``."""
    return next(n for n in itertools.count(1) if p_value([0.0] * n, bound) <= error)


def p_value(losses: Sequence[float], bound: float) -> float:
    """Of the hypothesis that the mean of independent losses between 0 and 1 is above ``bound``: Hoeffding-Bentkus.

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
    """The last of some settings, ordered from safe to bold before any was measured, whose mean loss is under a bound.

    Tests them in this order and stops at the first that fails, so that the chance that the result is wrong is at most
    ``error``, however many there are.

    Args:
      losses: of each setting, of the same independent samples (documents), between 0 and 1.
      bound: on the mean.
      error: the probability that the answer is wrong.

    Returns:
      An index, or None where even the first fails.

    Source: Angelopoulos et al. 2021 (Learn then Test), fixed-sequence testing; used so by Schuster et al. 2022 (CALM).
    """
    safe = None
    for i, of_setting in enumerate(losses):
        if p_value(of_setting, bound) > error:
            break
        safe = i
    return safe
