"""Confidence intervals."""

import numpy as np
from scipy.special import stdtrit


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % interval of the mean over the first axis, by Student's t.

    NaN for fewer than two runs.
    """
    runs = len(values)
    if runs < 2:
        return np.full(values.shape[1:], np.nan)
    return stdtrit(runs - 1, 0.975) * np.std(values, axis=0, ddof=1) / np.sqrt(runs)
