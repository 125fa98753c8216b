"""The tuner: one for all methods of a comparison, so that every row has the same budget and grids.

A search on the first seed, then the best few on several. What differs between experiments is data:
the search, the grids, how many finalists.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import NamedTuple

import numpy as np

from benchmarks.core.search import Point, best_of, descend, finalists, search

Values = tuple[float, ...]
Cost = Callable[[Values, int], float]  # of hyperparameters and a seed; infinite: diverged


class Tuned(NamedTuple):
    """What a tuner found: the finalists, best first, and the cost of all tried on one seed."""

    finalists: list[Values]
    tried: dict[Values, float]

    @property
    def best(self) -> Values:
        """The first finalist."""
        return self.finalists[0]


class Tuner(NamedTuple):
    """How hyperparameters are found."""

    # (cost, start, sizes) -> cost of every point that was tried; see `search.py`
    search: Callable[..., dict[Point, float]]
    rates: Sequence[float]  # the grid of learning rates
    strengths: Mapping[str, Sequence[float]]  # the grids of second hyperparameters, by name
    search_seeds: int = 1  # how many seeds the search runs on; costs are means
    num_finalists: int = 1  # how many of the best run on further seeds
    final_seeds: int = 1  # how many seeds then decide
    words: str = ""  # all this as a sentence

    def axes(self, *names: str | None) -> list[Sequence[float]]:
        """The grids of the rate and of these hyperparameters, if there are any."""
        return [self.rates, *(self.strengths[name] for name in names if name is not None)]

    def tune(
        self,
        cost: Cost,
        axes: Sequence[Sequence[float]],
        starts: Sequence[Values],
        seeds: Sequence[int],
    ) -> Tuned:
        """Search from the best of some starts, of which the nearest grid points are taken."""

        def at(point: Point) -> Values:
            return tuple(axis[index] for axis, index in zip(axes, point, strict=True))

        @cache
        def first(point: Point) -> float:
            return fmean(cost(at(point), seed) for seed in seeds[: self.search_seeds])

        tried = {point: first(point) for point in (nearest(axes, start) for start in starts)}
        tried |= self.search(first, best_of(tried), [len(axis) for axis in axes])
        return self.choose({at(point): value for point, value in tried.items()}, cost, seeds)

    def choose(self, tried: dict[Values, float], cost: Cost, seeds: Sequence[int]) -> Tuned:
        """The best of those tried on the first seeds, ranked by their mean on several."""
        means = {
            values: fmean(cost(values, seed) for seed in seeds[: self.final_seeds])
            for values in finalists(tried, self.num_finalists)
        }
        return Tuned(sorted(means, key=lambda values: means[values]), tried)


def nearest(axes: Sequence[Sequence[float]], values: Values) -> Point:
    """The grid point nearest to some values, on logarithmic scales."""
    return tuple(
        int(np.argmin(np.abs(np.log(axis) - math.log(value))))
        for axis, value in zip(axes, values, strict=True)
    )


# The grids of all experiments: half decades of rates, decades of penalties.
RATES = tuple(float(f"{mantissa}e{exponent}") for exponent in range(-5, 3) for mantissa in (1, 3))
PENALTIES = tuple(10.0**k for k in range(-5, 6))

# One axis after the other, on one seed, rates to 30: of the records of CIFAR-10 and Burgers'
# equation.
BY_AXES = Tuner(
    descend,
    RATES[:-2],
    {"lam": PENALTIES, "beta": PENALTIES, "ratio": (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)},
    words="Every method is tuned by the last validation metric on the same grids, half decades of "
    "rates and decades of lam or beta, along one axis after the other on seed 0",
)
# Rate and second hyperparameter together: 20 runs at most, the best three on a second seed. A ratio
# of one is the ordinary gradient head.
JOINTLY = Tuner(
    search,
    RATES,
    {
        "lam": tuple(float(f"1e{k}") for k in range(-4, 10)),
        "beta": PENALTIES,
        "ratio": tuple(float(f"1e{k}") for k in range(-6, 4)),
    },
    num_finalists=3,
    final_seeds=2,
    words="Every row has the same budget: at most 20 runs of a joint search over half decades of "
    "rates and decades of lam, beta or ratio on seed 0, the best three on a second seed too, "
    "chosen by the last validation metric; of these the next where a seed diverges",
)
