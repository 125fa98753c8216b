"""Searches on grids of indices. Knows numbers only; `tuner.py` says what they stand for."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

Point = tuple[int, ...]
Key = TypeVar("Key")  # a point, or what it stands for


def search(
    cost: Callable[[Point], float],
    start: Point,
    sizes: Sequence[int],
    at_most: int = 20,
    stride: int = 2,
) -> dict[Point, float]:
    """Joint search on a grid of indices: a coarse grid, then downhill in every direction.

    Two hyperparameters trade off along a ridge (a rate and a penalty do), which steps along one
    axis after the other cannot follow. So the moves from the best point are all neighbours, both
    diagonals among them, and then those of a knight in chess; which comes first is guessed from the
    points that were tried. The start is the middle of the coarse grid, of three points along each
    axis; if all of them are infinite, which is to say diverged, the search walks down the first
    axis (smaller rates). It ends after `at_most` points. Returns the cost of every point tried.
    """
    tried: dict[Point, float] = {}

    def inside(point: Point) -> bool:
        return all(0 <= index < size for index, size in zip(point, sizes, strict=True))

    for point in filter(inside, itertools.product(*((i, i - stride, i + stride) for i in start))):
        if len(tried) < at_most:
            tried[point] = cost(point)
    below = start
    while all(map(math.isinf, tried.values())) and below[0] > 0 and len(tried) < at_most:
        below = (below[0] - 1, *below[1:])
        if below not in tried:
            tried[below] = cost(below)

    moves = [move for move in itertools.product(range(-2, 3), repeat=len(start)) if any(move)]
    moves = [move for move in moves if math.gcd(*move) == 1]
    while len(tried) < at_most:
        best = best_of(tried)
        around = [tuple(i + step for i, step in zip(best, move, strict=True)) for move in moves]
        untried = [point for point in around if inside(point) and point not in tried]
        neighbours = [point for point in untried if math.dist(point, best) < 2]
        if not untried:
            break
        point = min(neighbours or untried, key=lambda point: expected_rank(point, tried))
        tried[point] = cost(point)
    return tried


def expected_rank(point: Point, tried: dict[Point, float]) -> float:
    """Where a point may rank among those tried: the mean of their ranks, the near ones weighed."""
    ranks = {other: rank for rank, other in enumerate(sorted(tried, key=lambda p: tried[p]))}
    weights = {other: math.dist(other, point) ** -3 for other in tried}
    return sum(weights[other] * ranks[other] for other in tried) / sum(weights.values())


def descend(
    cost: Callable[[Point], float], start: Point, sizes: Sequence[int], at_most: int = 40
) -> dict[Point, float]:
    """Coordinate search on a grid of indices: the cost of every point that was tried.

    From a start of infinite cost, walk down the first axis (smaller rates) until it is finite.
    Then, along one axis after the other, walk downhill until the best point lies between two worse
    ones or at the end of the grid; stop when a whole round has changed nothing. For a cost with one
    valley along each axis this finds the grid's minimum at a fraction of its runs.
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


def best_of(tried: dict[Key, float]) -> Key:
    """The point of lowest cost; the first one tried among equals."""
    return min(tried, key=lambda point: tried[point])


def finalists(tried: dict[Key, float], number: int) -> list[Key]:
    """The points of lowest finite cost, best first; the best one in any case."""
    ranked = sorted(tried, key=lambda point: tried[point])
    return ranked[:1] + [point for point in ranked[1:number] if math.isfinite(tried[point])]
