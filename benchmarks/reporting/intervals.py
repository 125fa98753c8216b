"""Confidence intervals, and what they let one say of two means."""

import warnings
from collections.abc import Iterable

import numpy as np
from scipy.special import stdtrit
from scipy.stats import ttest_ind


def half_interval(values: np.ndarray) -> np.ndarray:
    """Half the width of the 95 % interval of the mean over the first axis, by Student's t.

    NaN for fewer than two runs.
    """
    runs = len(values)
    if runs < 2:
        return np.full(values.shape[1:], np.nan)
    return stdtrit(runs - 1, 0.975) * np.std(values, axis=0, ddof=1) / np.sqrt(runs)


def are_level(left: np.ndarray, right: np.ndarray) -> bool:
    """Whether the 95 % interval of the difference contains zero, by Welch's test; one run: no."""
    with warnings.catch_warnings(action="ignore"):  # of runs that agree in every digit, or diverge
        return bool(ttest_ind(left, right, equal_var=False).pvalue >= 0.05)


def is_below(left: np.ndarray, right: np.ndarray) -> bool | None:
    """Whether the mean of the left is smaller; None if the two are level."""
    return None if are_level(left, right) else bool(left.mean() < right.mean())


def all_of(verdicts: Iterable[bool | None]) -> bool | None:
    """One wrong place refutes a claim, one where nothing is decided leaves it undecided."""
    found = list(verdicts)
    return False if False in found else True if found and None not in found else None
