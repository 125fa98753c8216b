"""Quotients of times that were measured in turn, round by round."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from benchmarks.core.records import Record

ROUNDS = 9
BETA = 10.0  # and lam

Rows = list[tuple[Record, Record]]  # keys and records
Cell = Callable[[tuple[Record, Record]], str]


class Ratio(NamedTuple):
    """Quotients of two candidates over the rounds: median, quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(record: Record, one: str, other: str) -> Ratio | None:
    """How many times as long as the other the one takes; None if either was not there."""
    seconds = record["seconds"]
    if one not in seconds or other not in seconds:
        return None
    quotients = np.array(seconds[one]) / np.array(seconds[other])
    return Ratio(*(float(np.quantile(quotients, q)) for q in (0.5, 0.25, 0.75)))


def make_batch(n: int, d: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    """Features after a ReLU, which have a mean as features have, and targets; float32."""
    rng = np.random.default_rng([n, d, o])
    features = np.maximum(rng.standard_normal((n, d), np.float32), 0)
    return features, rng.standard_normal((n, o), np.float32)
