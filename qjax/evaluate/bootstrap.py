"""Confidence intervals by resampling sequences, not tokens: tokens of one text are not independent.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), the percentile interval.
"""

import numpy as np

from qjax.errors import DataError

RESAMPLES = 4000
LEVEL = 0.95


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [sequences], resampled with replacement.

    For a paired comparison pass the per-sequence differences: what the two have in common (hard
    and easy sequences) cancels, and the interval is far narrower than those of the two means.
    """
    if len(values) < 2:
        raise DataError("an interval needs two sequences or more; evaluate more of them")
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(values), size=(RESAMPLES, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
