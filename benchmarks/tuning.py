"""The search for hyperparameters: the same for every method, on the same grids.

Bottom of the benchmarks: knows numbers only.
"""

import math
from collections.abc import Callable, Sequence

Point = tuple[int, ...]


def descend(
    cost: Callable[[Point], float], start: Point, sizes: Sequence[int], at_most: int = 40
) -> dict[Point, float]:
    """Coordinate search on a grid of indices.

    From a start of infinite cost, walk down the first axis (smaller rates) until it is finite.
    Then, along one axis after the other, walk downhill until the best point lies between two worse
    ones or at the end of the grid; stop when a whole round has changed nothing. For a cost with one
    valley along each axis this finds the grid's minimum at a fraction of its runs.

    Args:
      cost: what to minimize; infinite where a run diverged. Called once per point.
      start: where to begin.
      sizes: number of grid points along each axis.
      at_most: number of points, after which the search ends wherever it is.

    Returns:
      Cost of every point that was tried.
    """
    tried: dict[Point, float] = {}

    def visit(point: Point) -> None:
        if point not in tried and len(tried) < at_most:
            tried[point] = cost(point)

    visit(start)
    while math.isinf(tried[start]) and start[0] > 0 and len(tried) < at_most:
        start = (start[0] - 1, *start[1:])
        visit(start)
    unchanged = 0
    axis = 0
    while unchanged < len(sizes) and len(tried) < at_most:
        before = best_of(tried)
        while True:
            best = best_of(tried)
            steps = [(*best[:axis], best[axis] + step, *best[axis + 1 :]) for step in (-1, 1)]
            new = [p for p in steps if 0 <= p[axis] < sizes[axis] and p not in tried]
            if not new or len(tried) >= at_most:
                break
            for point in new:
                visit(point)
        unchanged = unchanged + 1 if best_of(tried) == before else 1
        axis = (axis + 1) % len(sizes)
    return tried


def best_of(tried: dict[Point, float]) -> Point:
    """The point of lowest cost; the first one tried among equals."""
    return min(tried, key=lambda point: tried[point])


def finalists(tried: dict[Point, float], number: int) -> list[Point]:
    """The points of lowest finite cost, best first; the best one in any case."""
    ranked = sorted(tried, key=lambda point: tried[point])
    return ranked[:1] + [point for point in ranked[1:number] if math.isfinite(tried[point])]
