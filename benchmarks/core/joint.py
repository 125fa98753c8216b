"""Hyperparameters of a method by a joint search over rate and second hyperparameter.

Between `comparison.py` and the experiments. The budget is the same for every method: 20 runs of the
first seed at most, the best three again on the second, the best one on all seeds.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.core.comparison import RATES, Comparison, Config, Outcome
from benchmarks.core.methods import Method
from benchmarks.core.tuning import Point, search

BUDGET, NUM_FINALISTS = 20, 3
# Decades. A ratio of one is the ordinary gradient head.
STRENGTHS: Mapping[str, tuple[float, ...]] = {
    "lam": tuple(float(f"1e{k}") for k in range(-4, 8)),
    "ratio": tuple(float(f"1e{k}") for k in range(-4, 4)),
}
Candidate = tuple[float, float | None]


def tune(
    comparison: Comparison,
    method: Method,
    batch_size: int,
    seeds: Sequence[int],
    start: Candidate,
    candidates: Sequence[Candidate] = (),
) -> Outcome:
    """The best hyperparameters by the last validation metric, run on all seeds.

    Args:
      comparison: the problem, and its finished runs.
      method: which.
      batch_size: samples per step.
      seeds: the search runs on the first, its best three on the second, too.
      start: rate and second hyperparameter in the middle of the coarse grid.
      candidates: if given, only these are tried.

    Raises:
      MissingError: if a run is missing and nothing may be trained.
    """
    problem = comparison.problem

    def cost(candidate: Candidate, seed: int) -> float:
        last = comparison.run(Config(method, batch_size, *candidate, seed))["validation"][-1]
        return math.inf if last is None else problem.sign * last

    if candidates:
        tried = {candidate: cost(candidate, seeds[0]) for candidate in candidates}
    else:
        tried = _search(method, start, lambda candidate: cost(candidate, seeds[0]))
    ranked = sorted(tried, key=lambda candidate: tried[candidate])
    both = {c: sum(cost(c, seed) for seed in seeds[:2]) for c in ranked[:NUM_FINALISTS]}
    best = min(both, key=lambda candidate: both[candidate])
    return comparison.outcome(
        [Config(method, batch_size, *best, seed) for seed in seeds],
        [
            (*candidate, problem.worst if math.isinf(value) else problem.sign * value)
            for candidate, value in sorted(tried.items(), key=str)
        ],
    )


def best_candidates(outcome: Outcome, sign: int) -> list[Candidate]:
    """The three best of those that an outcome's search tried."""
    ranked = sorted(outcome.tried, key=lambda tried: sign * tried[-1])
    return [(rate, strength) for rate, strength, _ in ranked[:NUM_FINALISTS]]


def _search(
    method: Method, start: Candidate, cost: Callable[[Candidate], float]
) -> dict[Candidate, float]:
    strengths = () if method.strength is None else (STRENGTHS[method.strength],)
    axes = (RATES, *strengths)
    middle = tuple(
        int(np.argmin([abs(math.log(value / first)) for value in axis]))
        for axis, first in zip(axes, [value for value in start if value], strict=False)
    )

    def candidate(point: Point) -> Candidate:
        rate, *strength = (axis[index] for axis, index in zip(axes, point, strict=True))
        return rate, strength[0] if strength else None

    tried = search(lambda point: cost(candidate(point)), middle, [len(a) for a in axes], BUDGET)
    return {candidate(point): value for point, value in tried.items()}
